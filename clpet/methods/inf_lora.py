"""InfLoRA: branches that read only directions which earlier tasks did not use (Liang and Li, 2024, 2404.00228).

A_t is designed and frozen, B_t is trained: h = W x + s sum_i B_i A_i x. M spans a layer's inputs of the tasks before:
rows of A_t lie outside of it, so that B_t A_t x = 0 for x in span(M). The rules are those of GainLoRA's version.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.subspace import (
    InputCovariances,
    extend_basis,
    project_out,
    threshold,
    top_singular_vectors,
)
from clpet.methods.inc_lora import IncLoRA
from clpet.training.trainer import Trainer


class Design(Enum):
    """Where the rows of A_t come from."""

    random = "random"
    svd = "svd"


@dataclass
class InfLoRA(IncLoRA):
    """design=svd: the leading directions of the task's own inputs, as in the paper; random: Kaiming rows outside M."""

    design: Design = Design.svd
    epsilon: float = 0.995
    faithful_padding: bool = False

    def __post_init__(self) -> None:
        require(0 < self.epsilon < 1, "method.epsilon", self.epsilon, "between 0 and 1")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.bases: dict[str, Tensor] = {}  # M by the first layer that reads the input, fp32
        self.same: dict[str, str] = {}  # layer -> that first layer

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_branch(index)
        self.grow_head(index)
        self.design_branch(index)
        self.fit(trainer, index)

    def design_branch(self, index: int) -> None:
        """Sets A_t; only B_t will move."""
        if self.design is Design.svd:
            found, same = self.covariances(index)
            rows = {first: self.leading_rows(first, c) for first, c in found.items()}
        for name, layer in self.increments.layers.items():
            with torch.no_grad():
                if self.design is Design.svd:
                    layer.a.copy_(rows[same[name]])
                elif index > 0:
                    layer.a.copy_(projected(layer.a, self.bases[self.same[name]]))
            layer.a.requires_grad_(False)

    def leading_rows(self, first: str, covariance: Tensor) -> Tensor:
        """[r, d_in]: the top r left singular vectors of (I - M M^T) C, of norm 1 / sqrt(3)."""
        return top_singular_vectors(covariance, self.basis(first, covariance))[:, : self.increments.rank].T / 3**0.5

    def basis(self, name: str, covariance: Tensor) -> Tensor:
        """M in fp64; empty before the first task."""
        held = self.bases.get(name)
        return covariance[:, :0] if held is None else held.double()

    @torch.no_grad()
    def covariances(self, index: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """C of every distinct layer input over the task's train part, and the layer whose C each layer shares."""
        layers = {name: layer.module for name, layer in self.increments.layers.items()}
        pool, size = self.data.train, self.objective.eval_batch_size
        with InputCovariances(layers) as found:
            for rows in pool.by_length(pool.rows_of(index), size):
                batch = pool.batch(rows, self.objective.device)
                found.begin(*([] if self.faithful_padding else self.objective.masks(batch)))
                self.mixed_loss(batch, self.route(batch))
        return {name: covariance.mean() for name, covariance in found.covariances.items()}, found.source

    def mask(self, batch: Batch) -> Tensor:
        """[batch, length]: the positions that count."""
        return torch.ones_like(batch.attention_mask) if self.faithful_padding else batch.attention_mask

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        found, self.same = self.covariances(index)
        for name, covariance in found.items():
            self.extend(name, covariance, index)

    def extend(self, name: str, covariance: Tensor, index: int) -> None:
        """Adds to a basis what task `index` used."""
        epsilon = threshold(self.epsilon, index, len(self.benchmark))
        basis = extend_basis(self.basis(name, covariance), covariance, epsilon).float()
        self.bases[name] = basis.contiguous()  # as it comes back from a checkpoint: products round by memory layout

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in super().named_parameters().items() if tensor.requires_grad}

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(basis.numel() for basis in self.bases.values())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": self.bases, "same": self.same}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.same = state["same"]
        self.bases = {name: basis.to(self.objective.device) for name, basis in state["bases"].items()}
        for layer in self.increments.layers.values():
            layer.a.requires_grad_(False)


def projected(a: Tensor, basis: Tensor) -> Tensor:
    """A (I - M M^T) with every row scaled to norm 1 / sqrt(3), the expected norm of a Kaiming row."""
    rows = project_out(a.double(), basis.double())
    return (F.normalize(rows, eps=1e-4) / 3**0.5).to(a.dtype)  # where M leaves no room nothing but noise is left
