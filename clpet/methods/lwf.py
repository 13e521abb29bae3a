"""LwF: distil the model from before the task on the new task's data (Li and Hoiem, 2016).

reduction=sum, as ConPET's baseline (section 3.6): + lambda T^2 sum over the batch of CE(softmax(teacher / T),
softmax(student / T)). reduction=mean: + lambda T^2 mean KL(softmax(teacher / T) || softmax(student / T)).
The softmax is over the old labels, or, where answers are written, over the vocabulary at every answer token.
"""

import logging
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.replay import Static

log = logging.getLogger(__name__)


class Reduction(Enum):
    """Over the examples of a batch, or its answer tokens; auto: sum over examples, mean over tokens."""

    auto = "auto"
    sum = "sum"
    mean = "mean"


@dataclass
class LwF(Static):
    """The teacher's logits of old labels are computed once, before training; columns match by label.

    Those of a whole vocabulary are too large to keep: the trained tensors are, and each step asks them again.
    """

    strength: float = 1.0
    temperature: float | None = None
    reduction: Reduction = Reduction.auto

    objectives: ClassVar[tuple[str, ...]] = ("classification", "text_to_text")

    def __post_init__(self) -> None:
        require(self.strength >= 0, "method.strength", self.strength, "0 or more")
        t = self.temperature
        require(t is None or t > 0, "method.temperature", t, "more than 0, or null")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.writes = self.objective.generates
        self.before: dict[str, Tensor] = {}  # of answers: what was trained before the task
        self.t = self.temperature or (2.0 if self.writes else 1.0)
        self.sums = self.reduction is Reduction.sum or (self.reduction is Reduction.auto and not self.writes)
        log.info("LwF distils at T = %s, %s", self.t, "summed over a batch" if self.sums else "mean")

    def learn(self, task: Task, index: int, trainer: Any) -> None:
        if self.writes:
            self.before = (
                {name: value.detach().clone() for name, value in self.named_parameters().items()} if index else {}
            )
            super().learn(task, index, trainer)
            return
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
        if self.writes:
            return self.loss_of_answers(batch)
        logits = self.logits(batch)
        loss = self.objective.cross_entropy(logits, batch)
        if not self.old:
            return loss
        teacher = self.teacher[self.place[torch.from_numpy(batch.rows)].to(self.teacher.device)]
        return loss + self.distilled(teacher, self.old_logits(logits), batch)

    def loss_of_answers(self, batch: Batch) -> Tensor:
        """Both terms over the tokens of the answers."""
        teacher = self.answers_before(batch) if self.before else None
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, self.objective.targets(batch))
        return loss if teacher is None else loss + self.distilled(teacher, logits, batch)

    def distilled(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """The weighted distillation term; a sum over a batch is undone where a step is made of several."""
        if self.sums:
            return self.strength * distillation(teacher, student, self.t) / batch.share
        return self.strength * divergence(teacher, student, self.t)

    @torch.no_grad()
    def answers_before(self, batch: Batch) -> Tensor:
        """[answer tokens, vocabulary] logits of the model from before the task, without dropout."""
        adapters, trained = self.objective.adapters, self.named_parameters()
        now = {name: value.data for name, value in trained.items()}
        training = adapters.training
        try:
            for name, value in trained.items():
                value.data = self.before[name]
            adapters.train_mode(False)
            return self.logits(batch)
        finally:
            for name, value in trained.items():
                value.data = now[name]
            adapters.train_mode(training)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(value.numel() for value in self.before.values())


def distillation(teacher: Tensor, student: Tensor, t: float = 1.0) -> Tensor:
    """T^2 times the sum over the batch of the cross-entropy from the teacher's to the student's softmax."""
    return -(t * t) * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum()


def divergence(teacher: Tensor, student: Tensor, t: float) -> Tensor:
    """T^2 times the mean over the batch of KL(teacher || student)."""
    old, new = (teacher / t).log_softmax(1), (student / t).log_softmax(1)
    return t * t * (old.exp() * (old - new)).sum(1).mean()
