"""O-LoRA: LoRA branches with mutually orthogonal row spaces (Wang et al., 2023, arXiv 2310.14152).

L = CE + l1 sum_layers sum_ij |A_{1:t-1} A_t^T|_ij + l2 sum_layers (||A_t|| + ||B_t||), where norms are not squared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clpet.config.schema import FloatOrList, require
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.inc_lora import IncLoRA
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class OLoRA(IncLoRA):
    """All branches are added. `orthogonality` = l1 and `decay` = l2 are numbers, or lists with one number per task.

    A_t = 0 minimises the l1 term, so with a large l1 the branch is orthogonal but learns nothing.
    """

    orthogonality: FloatOrList = 0.5
    decay: FloatOrList = 0.0

    def __post_init__(self) -> None:
        for key in ("orthogonality", "decay"):
            require_numbers(f"method.{key}", getattr(self, key))

    def check_benchmark(self, benchmark: Benchmark) -> None:
        for key in ("orthogonality", "decay"):
            check_count(f"method.{key}", getattr(self, key), benchmark)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.strengths = of_task(self.orthogonality, index), of_task(self.decay, index)
        super().learn(task, index, trainer)

    def step_loss(self, context: StepContext) -> Tensor | None:
        terms = zip(self.strengths, (self.overlap, self.norms), strict=True)
        used = [strength * term() for strength, term in terms if strength]
        return sum(used[1:], used[0]) if used else None

    def overlap(self) -> Tensor:
        """sum_layers sum_ij |A_{1:t-1} A_t^T|_ij; B plays no role."""
        return torch.stack([overlap(layer.frozen_A, layer.A) for layer in self.stack.layers.values()]).sum()

    def norms(self) -> Tensor:
        """sum_layers (||A_t|| + ||B_t||), Frobenius norms of the trained branch."""
        return torch.stack([tensor.norm() for tensor in self.stack.current().values()]).sum()


def require_numbers(key: str, value: FloatOrList) -> None:
    """Raises ConfigError unless an option is a number of 0 or more, or a list of such numbers."""
    numbers = value if isinstance(value, list) else [value]
    valid = bool(numbers) and all(isinstance(v, int | float) and v >= 0 for v in numbers)
    require(valid, key, value, "a number of 0 or more, or a list of one per task")


def check_count(key: str, value: FloatOrList, benchmark: Benchmark) -> None:
    """Raises ConfigError for a list whose length is not the number of tasks."""
    if isinstance(value, list) and len(value) != len(benchmark):
        raise ConfigError(
            f"{key} has {len(value)} values for {len(benchmark)} tasks: set one number, or a list with one per task"
        )


def of_task(value: FloatOrList, index: int) -> float:
    """Value for task `index` of an option that is one number for all tasks or a list."""
    return float(value[index] if isinstance(value, list) else value)


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """sum_ij |old new^T|_ij."""
    return (old @ new.T).abs().sum()
