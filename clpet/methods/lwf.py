"""LwF as ConPET's no-replay baseline (specification, section 3.6): distil the model from before the task.

loss += lambda * sum over the batch of CE(softmax(teacher, old labels), log-softmax(student, old labels)), T = 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clpet.config import require
from clpet.methods.replay import Static
from clpet.tasks import Task
from clpet.text import Batch


@dataclass
class LwF(Static):
    """The teacher's logits on the task's own data are computed once, before training; columns match by label."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        require(self.strength >= 0, "method.strength", self.strength, "0 or more")

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
        return loss + self.strength * distillation(teacher, self.old_logits(logits)) / batch.share  # a sum, no mean


def distillation(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over the batch of the cross-entropy from the teacher's to the student's softmax."""
    return -(teacher.softmax(1) * student.log_softmax(1)).sum()
