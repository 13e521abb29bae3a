"""Task arithmetic: adds up what every task changed (Ilharco et al., 2023, arXiv 2212.04089)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.training.trainer import Trainer


@dataclass
class TaskArithmetic(Method):
    """theta = theta_0 + scale sum_j tau_j with tau_j = theta_j - theta_0: every task starts from theta_0 (section 4)."""

    scale: float = 0.5

    saved: ClassVar[tuple[str, ...]] = ("start", "sum_of_vectors")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.start = {name: value.detach().clone() for name, value in self.adapter().items()}
        self.sum_of_vectors = {name: torch.zeros_like(value) for name, value in self.start.items()}

    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """The tensors that are merged; rows of the head belong to one task each."""
        return self.objective.adapters.tensors("default")

    @torch.no_grad()
    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        for name, value in self.adapter().items():
            value.copy_(self.start[name])
        with torch.enable_grad():
            super().learn(task, index, trainer)

    @torch.no_grad()
    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        for name, value in self.adapter().items():
            self.sum_of_vectors[name] += value - self.start[name]
            value.copy_(self.start[name] + self.scale * self.sum_of_vectors[name])
