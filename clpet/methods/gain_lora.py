"""GainLoRA: gated branches whose gates barely respond to inputs of earlier tasks (Liang et al., 2025).

h = W x + sum_i a_i(x) s B_i A_i x with branches of InfLoRA (design=svd) and gates
    a_i = |2 sigmoid(4 cos(key_i, g_i)) - 1| = |tanh(2 cos(key_i, g_i))|,    g_i = SiLU(W2 SiLU(W1 x')),
where x' is the mean token embedding. Every update of a gate is projected out of the span of earlier inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.features import mean_pool, token_embeddings, vocabulary
from clpet.methods.components.subspace import Covariance, project_out, sum_over_ranks, top_singular_vectors
from clpet.methods.inf_lora import InfLoRA
from clpet.methods.saved_state import Growing
from clpet.runtime.distributed import get_world
from clpet.training.step import StepContext

INPUT_OF = {"down": "x", "up": "hidden", "key": "gate"}  # tensor of a gate -> the input whose basis it must not touch


class Gate(nn.Module):
    """Gate of one task: W1 = `down` [hidden, d], W2 = `up` [d, hidden] and `key` [1, d]."""

    def __init__(self, dim: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * bound)

        self.down, self.up = uniform(dim**-0.5, hidden, dim), uniform(hidden**-0.5, dim, hidden)
        self.key = uniform(1.0, 1, dim)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """x' [batch, d], SiLU(W1 x') and g(x'): the inputs of W1, W2 and the key."""
        hidden = F.silu(x @ self.down.T)
        return {"x": x, "hidden": hidden, "gate": F.silu(hidden @ self.up.T)}

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim] -> [batch]: a(x)."""
        return opening(F.cosine_similarity(self.stages(x)["gate"], self.key))


@dataclass
class GainLoRA(InfLoRA):
    """Task t trains B_t and gate_t, which starts from gate_{t-1}; all older gates are frozen.

    rescale=true scales every row of the projected gate to its norm after the unprojected step, as in the published
    code; rescale=false keeps the gate's updates exactly orthogonal to earlier inputs.
    """

    hidden: int = 100
    rescale: bool = True

    mergeable: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = ("gates",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden >= 1, "method.hidden", self.hidden, "at least 1")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.gates = Growing(lambda: self.new_gate("loaded"))
        self.old_gate: dict[str, Tensor] = {}  # tensors of the newest gate before a step, from task 2 on

    def new_gate(self, index: int | str) -> Gate:
        """A randomly initialised gate."""
        dim = vocabulary(self.objective.adapters.model).shape[1]
        return Gate(dim, self.hidden, derive(self.seed, "gate", index)).to(self.objective.device)

    def add_branch(self, index: int) -> None:
        super().add_branch(index)
        gate = self.new_gate(index)
        for old in self.gates:
            old.requires_grad_(False)
        with torch.no_grad():
            for old in self.gates[-1:]:  # gate_t starts from gate_{t-1}
                gate.down.copy_(old.down)
                gate.up.copy_(old.up)
        self.gates.append(gate)
        covariance = self.gate_covariances(index)["gate"]
        # The key starts at the top direction of the new task's g that earlier tasks do not use.
        direction = top_singular_vectors(covariance, self.basis("gate", covariance))[:, 0]
        with torch.no_grad():
            gate.key.copy_(direction * gate.key.norm())

    def pool(self, batch: Batch) -> Tensor:
        """[batch, dim]: x', the mean token embedding."""
        return mean_pool(token_embeddings(self.objective.adapters.model, batch), self.mask(batch))

    def route(self, batch: Batch) -> Tensor:
        pooled = self.pool(batch)
        return torch.stack([gate(pooled) for gate in self.gates], dim=1)

    @torch.no_grad()
    def gate_covariances(self, index: int) -> dict[str, Tensor]:
        """C of the inputs of W1, W2 and the key of the newest gate, over the task's train examples."""
        covariances: dict[str, Covariance] = {}
        pool, size = self.data.train, self.objective.eval_batch_size
        for rows in get_world().share(pool.by_length(pool.rows_of(index), size)):
            batch = pool.batch(rows, self.objective.device)
            for name, x in self.gates[-1].stages(self.pool(batch)).items():
                covariances.setdefault(name, Covariance(x.shape[1], x.device)).add(x)
        sum_over_ranks(covariances, self.objective.device)
        return {name: covariance.mean() for name, covariance in covariances.items()}

    def adjust_gradients(self, context: StepContext) -> None:
        """Copies the gate before the step, from which `after_step` computes its update."""
        if len(self.gates) > 1:
            self.old_gate = {name: tensor.detach().clone() for name, tensor in self.gates[-1].named_parameters()}

    @torch.no_grad()
    def after_step(self, context: StepContext) -> None:
        """Projects the gate's update: W + dW (I - M M^T). Projecting gradients would not do, AdamW rescales them."""
        for name, before in self.old_gate.items():
            tensor = self.gates[-1].get_parameter(name)
            tensor.copy_(projected_step(before, tensor, self.bases[INPUT_OF[name]], self.rescale))

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        for name, covariance in self.gate_covariances(index).items():
            self.extend(name, covariance, index)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        gate = {f"gate{len(self.gates)}.{name}": p for gate in self.gates[-1:] for name, p in gate.named_parameters()}
        return {**super().named_parameters(), **gate}


def opening(cosine: Tensor) -> Tensor:
    """a = |2 sigmoid(4 c) - 1| = |tanh(2 c)|."""
    return (2 * cosine).tanh().abs()


def projected_step(before: Tensor, after: Tensor, basis: Tensor, rescale: bool) -> Tensor:
    """W + dW (I - M M^T), where dW = `after` - `before`; with `rescale` every row gets the norm of W + dW."""
    moved = before + project_out(after - before, basis)
    return moved * (after.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)) if rescale else moved
