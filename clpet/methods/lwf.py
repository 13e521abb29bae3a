"""LwF: distil the model from before the task on the new task's data (Li and Hoiem, 2016), on the old labels.

reduction=sum, as ConPET's baseline (section 3.6): + lambda T^2 sum over the batch of CE(softmax(teacher / T),
softmax(student / T)). reduction=mean: + lambda T^2 mean KL(softmax(teacher / T) || softmax(student / T)).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from clpet.config import require
from clpet.methods.replay import Static
from clpet.tasks import Task
from clpet.text import Batch


class Reduction(Enum):
    """Over the examples of a batch."""

    sum = "sum"
    mean = "mean"


@dataclass
class LwF(Static):
    """The teacher's logits on the task's own data are computed once, before training; columns match by label."""

    strength: float = 1.0
    temperature: float = 1.0
    reduction: Reduction = Reduction.sum

    objectives: ClassVar[tuple[str, ...]] = ("classification",)

    def __post_init__(self) -> None:
        require(self.strength >= 0, "method.strength", self.strength, "0 or more")
        require(self.temperature > 0, "method.temperature", self.temperature, "more than 0")

    def learn(self, task: Task, index: int, trainer: Any) -> None:
        self.old = self.benchmark.seen_labels(index)
        rows = self.data.train.rows_of(index)
        self.place = torch.full((len(self.data.train),), -1)
        self.place[rows] = torch.arange(len(rows))
        if self.old:
            self.teacher = self.embed(rows, lambda batch: self.old_logits(self.logits(batch)))
        super().learn(task, index, trainer)

    def old_logits(self, logits: Tensor) -> Tensor:
        """The columns of the old labels, in the order of `old`."""
        return logits[:, self.objective.head.columns(torch.as_tensor(self.old, device=logits.device))]

    def loss(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)
        loss = torch.nn.functional.cross_entropy(logits, self.objective.head.columns(batch.labels))
        if not self.old:
            return loss
        teacher = self.teacher[self.place[torch.from_numpy(batch.rows)].to(self.teacher.device)]
        student = self.old_logits(logits)
        if self.reduction is Reduction.mean:
            return loss + self.strength * divergence(teacher, student, self.temperature)
        return loss + self.strength * distillation(teacher, student, self.temperature) / batch.share  # a sum, no mean


def distillation(teacher: Tensor, student: Tensor, t: float = 1.0) -> Tensor:
    """T^2 times the sum over the batch of the cross-entropy from the teacher's to the student's softmax."""
    return -(t * t) * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum()


def divergence(teacher: Tensor, student: Tensor, t: float) -> Tensor:
    """T^2 times the mean over the batch of KL(teacher || student)."""
    old, new = (teacher / t).log_softmax(1), (student / t).log_softmax(1)
    return t * t * (old.exp() * (old - new)).sum(1).mean()
