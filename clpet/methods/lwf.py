"""LwF: distils the model from before the task into the new one, on the new task's data (Li and Hoiem, 2016).

    reduction=sum    L = CE + lambda T^2 sum over the batch of CE(softmax(teacher / T), softmax(student / T));
                     the baseline of ConPET (section 3.6)
    reduction=mean   L = CE + lambda T^2 mean KL(softmax(teacher / T) || softmax(student / T))
The softmax is over the old labels, or for generated answers over the vocabulary at every answer token.
"""

import logging
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.row_table import RowTable
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.replay import Static
from clpet.objectives.classification import Classification
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)


class Reduction(Enum):
    """Reduction over the examples of a batch or its answer tokens; auto: sum over examples, mean over tokens."""

    auto = "auto"
    sum = "sum"
    mean = "mean"


@dataclass
class LwF(Static):
    """Computes the teacher's logits of old labels once, before training.

    Logits over a whole vocabulary are too large to be stored. Then the teacher's trained tensors are stored instead,
    and every step runs the teacher again.
    """

    strength: float = 1.0
    temperature: float | None = None
    reduction: Reduction = Reduction.auto

    supports_plain_text: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.strength >= 0, "method.strength", self.strength, "0 or more")
        t = self.temperature
        require(t is None or t > 0, "method.temperature", t, "more than 0, or null")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.writes = not self.objective.traits.has_labels
        self.teacher_weights: SecondWeights | None = None  # for generated answers, from task 2 on
        self.t = self.temperature or (2.0 if self.writes else 1.0)
        self.sums = self.reduction is Reduction.sum or (self.reduction is Reduction.auto and not self.writes)
        log.info("LwF distils at T = %s, %s", self.t, "summed over a batch" if self.sums else "mean")

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if self.writes:
            self.teacher_weights = SecondWeights(self, self.named_parameters()) if index else None
            super().learn(task, index, trainer)
            return
        self.old = self.benchmark.seen_labels(index)
        rows = self.data.train.rows_of(index)
        if self.old:
            logits = self.embed(rows, lambda batch: self.old_logits(self.logits(batch)))
            self.teacher = RowTable(rows, logits, len(self.data.train))
        super().learn(task, index, trainer)

    @property
    def classification(self) -> Classification:
        """The objective, where it has labels."""
        assert isinstance(self.objective, Classification)
        return self.objective

    def old_logits(self, logits: Tensor) -> Tensor:
        """[batch, old labels]: the columns of the old labels in the order of `old`."""
        return logits[:, self.classification.head.columns(torch.as_tensor(self.old, device=logits.device))]

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        if self.writes:
            return self.loss_of_answers(batch)
        logits = self.logits(batch)
        loss = self.classification.cross_entropy(logits, batch)
        if not self.old:
            return loss
        return loss + self.distilled(self.teacher[batch.rows], self.old_logits(logits), batch)

    def loss_of_answers(self, batch: Batch) -> Tensor:
        """Cross-entropy and distillation over the answer tokens."""
        teacher = self.teacher_weights.logits(batch) if self.teacher_weights else None
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, self.objective.targets(batch))
        return loss if teacher is None else loss + self.distilled(teacher, logits, batch)

    def distilled(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """The weighted distillation term, lambda T^2 (...)."""
        if self.sums:  # the trainer weights a micro-batch by its share of the batch; dividing keeps the sum a sum
            return self.strength * distillation(teacher, student, self.t) / batch.share
        return self.strength * divergence(teacher, student, self.t)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + (self.teacher_weights.count() if self.teacher_weights else 0)


def distillation(teacher: Tensor, student: Tensor, t: float = 1.0) -> Tensor:
    """T^2 sum over the batch of CE(softmax(teacher / T), softmax(student / T))."""
    return -(t * t) * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum()


def divergence(teacher: Tensor, student: Tensor, t: float) -> Tensor:
    """T^2 mean over the batch of KL(softmax(teacher / T) || softmax(student / T))."""
    old, new = (teacher / t).log_softmax(1), (student / t).log_softmax(1)
    return t * t * (old.exp() * (old - new)).sum(1).mean()
