"""SEQ*: the backbone is trained at the start of the first task and then frozen (Zheng et al., 2024, arXiv 2312.07887).

    warm-up     the adapter and the head are trained in the first `warmup` epochs of the first task
    afterwards  only the head's rows of the current task; those of old tasks stay as they are, and stay in the softmax
    cosine      z = scale w . h / (|w| |h|), without a bias, where no old examples are replayed (method.head=auto)
With future_labels=true the rows of all tasks are in the softmax from the start (pre-allocation).
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.replay import Static
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.classification import Classification, Head
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class HeadKind(Enum):
    """How logits are computed; auto: cosine without replay, linear with it."""

    auto = "auto"
    cosine = "cosine"
    linear = "linear"


@dataclass
class SeqStar(Static[Classification]):
    """After the warm-up a step runs the backbone without gradients."""

    warmup: int = 3
    head: HeadKind = HeadKind.auto
    scale: float = 10.0

    needs_labels: ClassVar[bool] = True
    uses_replay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.warmup >= 0, "method.warmup", self.warmup, "0 or more")
        require(self.scale > 0, "method.scale", self.scale, "more than 0")

    def mixes_tasks(self, replay: str) -> bool:
        return True  # old rows stay in the softmax

    def ineffective(self) -> dict[str, str]:
        return {} if self.cosine else {"method.scale": "it is the factor of cosines, and the head is linear"}

    @property
    def cosine(self) -> bool:
        """Whether logits are cosines."""
        return self.head is HeadKind.cosine or (self.head is HeadKind.auto and self.replay.name == "none")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.index: int | None = None  # task that this process has learned last

    def frozen(self, context: StepContext) -> bool:
        """Whether only the head is trained."""
        return context.task > 0 or context.epoch >= self.warmup

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.index = index
        self.grow_head(index)
        head = self.objective.head
        self.start = [value.detach().clone() for value in (head.weight, head.bias)]
        columns = head.columns(torch.tensor(self.benchmark.task_labels(index)))
        self.others = torch.ones(len(head.labels), dtype=torch.bool)  # rows that this task does not train
        self.others[columns] = False
        self.others = self.others.to(head.weight.device)
        self.fit(trainer, index)

    def trainable_parameters(self) -> int:
        """Of the task learned last: the head's rows of its labels, and in the first one with a warm-up the adapter."""
        index = len(self.benchmark) - 1 if self.index is None else self.index
        rows = len(self.benchmark.task_labels(index)) * (self.objective.dim + 1)
        adapter = self.objective.adapters.count("default") if index == 0 and self.warmup else 0
        return rows + adapter

    def logits(self, batch: Batch) -> Tensor:
        return self.of_features(self.objective.features(batch), self.objective.head.weight, self.objective.head.bias)

    def of_features(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[batch, rows]: logits of features [batch, dim]."""
        return cosine_logits(h, weight, self.scale) if self.cosine else F.linear(h, weight, bias)

    def loss(self, context: StepContext) -> Tensor:
        batch, head = context.batch, self.objective.head
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen(context)):
            h = self.objective.features(batch)
        return self.objective.cross_entropy(self.of_features(h, head.weight, head.bias), batch)

    def adjust_gradients(self, context: StepContext) -> None:
        for value in (self.objective.head.weight, self.objective.head.bias):
            if value.grad is not None:
                value.grad[self.others] = 0

    @torch.no_grad()
    def after_step(self, context: StepContext) -> None:
        """Undoes what the optimiser's weight decay has changed in rows of other tasks."""
        for value, start in zip((self.objective.head.weight, self.objective.head.bias), self.start, strict=True):
            value[self.others] = start[self.others]

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        if not self.cosine:
            return super().predict(batch, choices)
        head, h = self.objective.head, self.objective.features(batch)
        scores = cosine_logits(h, head.start[:, :-1], self.scale)
        if head.labels:
            scores[:, head.labels] = cosine_logits(h, head.weight, self.scale)
        return Predictions(scores)

    def heads(self) -> dict[str, Head]:
        """With cosines a head whose products with a feature are |h| times the logits: rows `scale` w / |w|, no bias."""
        if not self.cosine:
            return super().heads()
        head = self.objective.new_head(self.objective.seed)
        trained = self.objective.head
        head.load({
            "labels": trained.labels,
            "weight": self.scale * F.normalize(trained.weight.detach(), dim=1),
            "bias": torch.zeros_like(trained.bias),
        })  # fmt: skip
        return {"default": head}


def cosine_logits(h: Tensor, weight: Tensor, scale: float) -> Tensor:
    """[batch, rows]: scale times the cosine of each feature [batch, dim] and each row [rows, dim]."""
    return scale * F.linear(F.normalize(h, dim=1), F.normalize(weight, dim=1))
