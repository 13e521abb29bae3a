"""InfLoRA: branches that do not respond to inputs of earlier tasks (Liang and Li, 2024, arXiv 2404.00228).

h = W x + s sum_i B_i A_i x. Before task t, A_t is designed and frozen; only B_t is trained. The columns of M are an
orthonormal basis of a layer's inputs in earlier tasks. The rows of A_t are orthogonal to M, so that B_t A_t x = 0 for
every x in span(M): training B_t does not change what earlier inputs give. After the task M is extended
(components/subspace.py). Details follow the version published with GainLoRA.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Benchmark, Task
from clpet.methods.components.subspace import (
    InputCovariances,
    extend_basis,
    project_out,
    sum_over_ranks,
    threshold,
    top_singular_vectors,
)
from clpet.methods.inc_lora import IncLoRA
from clpet.records import State
from clpet.runtime.distributed import get_world
from clpet.training.trainer import Trainer


class Design(Enum):
    """Origin of the rows of A_t: random, or singular vectors of the task's inputs."""

    random = "random"
    svd = "svd"


@dataclass
class InfLoRA(IncLoRA):
    """A_t for design=svd: top singular vectors of the task's inputs (the paper's); random: projected Kaiming rows."""

    design: Design = Design.svd
    epsilon: float = 0.995
    planned_tasks: int | None = None
    faithful_padding: bool = False

    needs_logits: ClassVar[bool] = True  # its statistics are of the one pass that computes them
    saved: ClassVar[tuple[str, ...]] = ("bases",)
    saved_uncounted: ClassVar[tuple[str, ...]] = ("source=same",)

    def __post_init__(self) -> None:
        require(0 < self.epsilon < 1, "method.epsilon", self.epsilon, "between 0 and 1")

    def check_benchmark(self, benchmark: Benchmark) -> None:
        planned, tasks = self.planned_tasks, len(benchmark)
        require(planned is None or planned >= tasks, "method.planned_tasks", planned, f"at least {tasks}, or null")

    def tied_to_later_tasks(self, learned: int, before: int, now: int) -> str:
        if self.planned_tasks or learned == 1:  # the threshold of the first task is epsilon, whatever follows
            return ""
        return "its threshold depends on the number of tasks; method.planned_tasks=N fixes that number from the start"

    def init_adapters(self) -> None:
        super().init_adapters()
        self.bases: dict[str, Tensor] = {}  # M in fp32, by the layer that represents an input
        self.source: dict[str, str] = {}  # layer -> the layer with the same input that represents it

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_branch(index)
        self.grow_head(index)
        self.design_branch(index)
        self.fit(trainer, index)

    def design_branch(self, index: int) -> None:
        """Sets and freezes A_t, so that only B_t is trained."""
        if self.design is Design.svd:
            covariances, source = self.covariances(index)
            rows = {name: self.top_rows(name, covariance) for name, covariance in covariances.items()}
        for name, layer in self.stack.layers.items():
            with torch.no_grad():
                if self.design is Design.svd:
                    layer.A.copy_(rows[source[name]])
                elif index > 0:
                    layer.A.copy_(projected(layer.A, self.bases[self.source[name]]))
            layer.A.requires_grad_(False)

    def top_rows(self, name: str, covariance: Tensor) -> Tensor:
        """[r, d_in]: the top r left singular vectors of (I - M M^T) C, of norm 1 / sqrt(3)."""
        return top_singular_vectors(covariance, self.basis(name, covariance))[:, : self.stack.rank].T / 3**0.5

    def basis(self, name: str, covariance: Tensor) -> Tensor:
        """M [d, q] in fp64; q = 0 before the first task."""
        basis = self.bases.get(name)
        return covariance[:, :0] if basis is None else basis.double()

    @torch.no_grad()
    def covariances(self, index: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """C of every distinct layer input over the task's train examples, and the layer whose C each layer shares."""
        layers = {name: layer.module for name, layer in self.stack.layers.items()}
        pool, size = self.data.train, self.objective.eval_batch_size
        with InputCovariances(layers) as inputs:
            for rows in get_world().share(pool.by_length(pool.rows_of(index), size)):
                batch = pool.batch(rows, self.objective.device)
                inputs.begin(*([] if self.faithful_padding else self.objective.masks(batch)))
                self.routed_loss(batch, self.route(batch))
        sum_over_ranks(inputs.covariances, self.objective.device)
        source = {layer: other for of_rank in get_world().gather(inputs.source) for layer, other in of_rank.items()}
        return {name: covariance.mean() for name, covariance in inputs.covariances.items()}, source

    def mask(self, batch: Batch) -> Tensor:
        """[batch, length]: 1 at positions that count; faithful_padding counts padding as the published code does."""
        return torch.ones_like(batch.attention_mask) if self.faithful_padding else batch.attention_mask

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        covariances, self.source = self.covariances(index)
        for name, covariance in covariances.items():
            self.extend(name, covariance, index)

    def extend(self, name: str, covariance: Tensor, index: int) -> None:
        """Extends a basis M by the directions that the inputs of task `index` need, with the threshold eps_t."""
        epsilon = threshold(self.epsilon, index, self.planned_tasks or len(self.benchmark))
        basis = extend_basis(self.basis(name, covariance), covariance, epsilon).float()
        self.bases[name] = basis.contiguous()  # the layout it has after resuming: rounding depends on it

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in super().named_parameters().items() if tensor.requires_grad}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        for layer in self.stack.layers.values():
            layer.A.requires_grad_(False)


def projected(a: Tensor, basis: Tensor) -> Tensor:
    """A (I - M M^T) with every row scaled to norm 1 / sqrt(3), about the norm of a Kaiming row."""
    rows = project_out(a.double(), basis.double())
    return (F.normalize(rows, eps=1e-4) / 3**0.5).to(a.dtype)  # eps: if M spans everything, rows are rounding noise
