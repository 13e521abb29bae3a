"""WA: the head's rows of new labels are scaled to the length of the old ones (Zhao et al., 2020, arXiv 1911.07053).

From task 2 on, with the share k of old labels among all, the logits z' from before the task and T the temperature,
    L = (1 - k) CE + k KD,   KD = mean over the batch of CE(softmax(z' / T), softmax(z / T)) over the old labels
on new examples and a memory. After the task, with the lengths of the head's weight rows (equation 6),
    w_new <- w_new mean |w_old| / mean |w_new|
The biases stay as they are. The factor is at most 1 (shrink_only, not in the paper): with AdamW rows grow with the time
that they are trained, so old rows are the longer ones, and the paper's factor would strengthen new labels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.benchmark import Task
from clpet.methods.components.row_table import RowTable
from clpet.methods.lwf import distillation
from clpet.methods.replay import Replay
from clpet.objectives.classification import Classification
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class CorrectedReplay(Replay[Classification]):
    """Replay with distillation, and a correction of the head after every task, which a subclass defines.

    The teacher's logits of all examples of a task are computed once, before it is trained.
    """

    temperature: float = 2.0
    distil: bool = True

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.temperature > 0, "method.temperature", self.temperature, "more than 0")
        require(
            not self.future_labels, "method.future_labels", self.future_labels, "false: rows of new labels are scaled"
        )

    def ineffective(self) -> dict[str, str]:
        return {} if self.distil else {"method.temperature": "it is that of the distillation, and method.distil=false"}

    def init_adapters(self) -> None:
        super().init_adapters()
        self.old = 0  # number of head rows before the task
        self.teacher: RowTable | None = None
        self.corrections: dict[str, float] = {}

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.old = len(self.objective.head.labels) if index else 0
        self.teacher, self.corrections = None, {}
        if self.old and self.distil:
            rows = trainer.rows(self.plan(index))
            self.teacher = RowTable(rows, self.embed(rows, self.logits)[:, : self.old], len(self.data.train))
        super().learn(task, index, trainer)

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        logits = self.logits(batch)
        loss = self.objective.cross_entropy(logits, batch)
        if self.teacher is None:
            return loss
        share = self.old / logits.shape[1]
        distilled = distillation(self.teacher[batch.rows], logits[:, : self.old], self.temperature)
        # The published loss has no factor T^2, and is a mean over the batch.
        return (1 - share) * loss + share * distilled / (self.temperature**2 * len(batch))

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        self.teacher = None
        if 0 < self.old < len(self.objective.head.labels):
            with torch.no_grad():
                self.corrections = self.correct()

    def correct(self) -> dict[str, float]:
        """Changes the head's rows of the new labels, those from `old` on; returns figures to record."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, float]:
        return self.corrections


@dataclass
class WA(CorrectedReplay):
    """Scales the head's rows of new labels."""

    shrink_only: bool = True

    def correct(self) -> dict[str, float]:
        weight, bias = self.objective.head.weight, self.objective.head.bias
        ratio = length_ratio(weight, self.old)
        weight[self.old :] *= ratio.clamp(max=1.0) if self.shrink_only else ratio
        biases = {"old_bias": float(bias[: self.old].mean()), "new_bias": float(bias[self.old :].mean())}
        return {"length_ratio": float(ratio), **biases}


def length_ratio(weight: Tensor, old: int) -> Tensor:
    """mean |w_old| / mean |w_new| of the rows of a head, of which the first `old` are old."""
    lengths = weight.norm(dim=1)
    ratio: Tensor = lengths[:old].mean() / lengths[old:].mean().clamp(min=torch.finfo(lengths.dtype).tiny)
    return ratio
