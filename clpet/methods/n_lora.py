"""N-LoRA: a LoRA branch per task, kept sparse so that branches do not collide (Yang et al., 2025, arXiv 2410.10179).

h = W x + s sum_{i <= t} B_i A_i x, where only B_t and A_t are trained, with
    L = CE + strength sum_layers |.|_1,   the term of the new branch, by `penalty`:
    update   |B_t A_t|_1, that of the paper (default)
    code     |A_t B_t|_1 with the matrices multiplied the other way, r x r, as in the published code; square layers only
    factors  |A_t|_1 + |B_t|_1, without a product
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clpet.config.schema import FloatOrList
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.inc_lora import IncLoRA
from clpet.methods.o_lora import check_count, of_task, require_numbers
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Penalty(Enum):
    """The product whose entries are made small."""

    update = "update"
    code = "code"
    factors = "factors"


@dataclass
class NLoRA(IncLoRA):
    """All branches are added. `strength` is a number, or a list with one number per task."""

    strength: FloatOrList = 1e-4
    penalty: Penalty = Penalty.update

    def __post_init__(self) -> None:
        require_numbers("method.strength", self.strength)

    def check_benchmark(self, benchmark: Benchmark) -> None:
        check_count("method.strength", self.strength, benchmark)

    def init_adapters(self) -> None:
        super().init_adapters()
        for name, layer in self.stack.layers.items() if self.penalty is Penalty.code else ():
            if layer.d_in != layer.d_out:
                raise ConfigError(
                    f"method.penalty=code needs square layers, but {name} has {layer.d_in} inputs and {layer.d_out} "
                    "outputs: set method.penalty=update, or peft.targets"
                )

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.weight = of_task(self.strength, index)
        super().learn(task, index, trainer)

    def step_loss(self, context: StepContext) -> Tensor | None:
        if not self.weight:
            return None
        term = PENALTIES[self.penalty]
        return self.weight * torch.stack([term(layer.A, layer.B) for layer in self.stack.layers.values()]).sum()


class AbsoluteProduct(torch.autograd.Function):
    """sum_ij |B A|_ij for A [r, d_in] and B [d_out, r]; the product is computed again in backward and not stored."""

    @staticmethod
    def forward(ctx: FunctionCtx, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(A, B)
        return (B @ A).abs().sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        A, B = ctx.saved_tensors  # type: ignore[attr-defined]
        sign = grad * (B @ A).sign()
        return B.T @ sign, sign @ A.T


def of_update(A: Tensor, B: Tensor) -> Tensor:
    """|B A|_1."""
    total: Tensor = AbsoluteProduct.apply(A, B)  # type: ignore[no-untyped-call]
    return total


def of_code(A: Tensor, B: Tensor) -> Tensor:
    """|A B|_1, for square layers."""
    return (A @ B).abs().sum()


def of_factors(A: Tensor, B: Tensor) -> Tensor:
    """|A|_1 + |B|_1."""
    return A.abs().sum() + B.abs().sum()


PENALTIES: dict[Penalty, Callable[[Tensor, Tensor], Tensor]] = {
    Penalty.update: of_update,
    Penalty.code: of_code,
    Penalty.factors: of_factors,
}
