"""SLAO: one LoRA is trained task by task from an orthogonal start, and merged with weights 1 / sqrt(i).

Qiao and Mahdavi, 2025, arXiv 2512.23017. Before task i >= 2, with the LoRA A, B that task i - 1 has trained and the
reduced QR decomposition A^T = Q R with a positive diagonal of R, training starts from
    A <- Q^T,   B stays (start_b=trained)
After it
    A_merge <- A,   B_merge <- B_merge + (B - B_merge) / sqrt(i)
and the answers are those of W + s B_merge A_merge. The head is not merged.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from clpet.data.benchmark import Task
from clpet.methods.second_adapter import SecondAdapter
from clpet.training.trainer import Trainer


class StartB(Enum):
    """The B from which a task starts."""

    trained = "trained"
    merged = "merged"


@dataclass
class SLAO(SecondAdapter):
    """The trained LoRA is the adapter, the merged one is `second`."""

    start_b: StartB = StartB.trained

    supported_pefts: ClassVar[tuple[str, ...]] = ("lora",)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        for name, value in self.second.trained.items() if index else ():
            with torch.no_grad():
                if ".lora_A." in name:
                    value.copy_(orthonormal_rows(value))
                elif self.start_b is StartB.merged and ".lora_B." in name:
                    value.copy_(self.second.tensors[name])
        super().learn(task, index, trainer)

    def with_task(self, index: int) -> dict[str, Tensor]:
        """The merged tensors once the trained ones of task `index` are part of them."""
        return {
            name: merged(self.second.tensors[name], value.detach(), index)
            if ".lora_B." in name
            else value.detach().clone()
            for name, value in self.second.trained.items()
        }

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        self.second.tensors = self.with_task(index)

    def validate(self, index: int) -> float:
        """The score with the present LoRA merged."""
        before, self.second.tensors = self.second.tensors, self.with_task(index)
        try:
            return super().validate(index)
        finally:
            self.second.tensors = before


def orthonormal_rows(A: Tensor) -> Tensor:
    """Q^T of A^T = Q R with a positive diagonal of R: orthonormal rows with the span of those of A [r, d]."""
    q, r = torch.linalg.qr(A.detach().double().T)
    rows: Tensor = (q * torch.where(r.diagonal() < 0, -1, 1)).T.to(A.dtype)
    return rows


def merged(old: Tensor, new: Tensor, index: int) -> Tensor:
    """B_merge + (B - B_merge) / sqrt(i) for task i = `index` + 1."""
    mean: Tensor = old + (new - old) / (index + 1) ** 0.5
    return mean
