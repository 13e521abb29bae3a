"""ER-ACE: new examples compete among new labels only (Caccia et al., 2022, arXiv 2104.05025).

    L = CE over the labels of the current task, mean over the new examples of a batch
      + CE over all labels seen so far, mean over its old examples
so that learning new labels does not push down the rows of old ones. The two means are added. Without old examples, in
the first task, it is plain training.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.methods.replay import Replay
from clpet.objectives.classification import Classification
from clpet.training.step import StepContext


class Classes(Enum):
    """Labels that compete for a new example: those of its task, or of the new examples in the batch (published)."""

    task = "task"
    batch = "batch"


@dataclass
class ERACE(Replay[Classification]):
    """Old examples come in the batches of `replay`, so both terms share one forward pass."""

    classes: Classes = Classes.task

    needs_labels: ClassVar[bool] = True

    def before_step(self, context: StepContext) -> None:
        """Counts new and old examples in the whole batch, and finds the labels that compete for the new ones."""
        pool = self.data.train
        new = pool.tasks[context.rows] == context.task
        self.counts = max(1, int(new.sum())), max(1, int((~new).sum()))
        of_batch = pool.labels[context.rows[new]].tolist()
        competing = of_batch if self.classes is Classes.batch else self.benchmark.task_labels(context.task)
        allowed = torch.full((len(self.benchmark.labels),), float("-inf"))
        allowed[torch.tensor(competing, dtype=torch.long)] = 0
        self.allowed = allowed.to(self.objective.device, non_blocking=True)

    def loss(self, context: StepContext) -> Tensor:
        batch, head = context.batch, self.objective.head
        logits, targets, new = self.logits(batch), self.objective.targets(batch), batch.tasks == context.task
        masked = torch.where(new[:, None], logits + self.allowed[head.ids], logits)
        weights = torch.where(new, 1 / self.counts[0], 1 / self.counts[1])
        if self.objective.label_weights is not None:
            weights = weights * self.objective.label_weights[batch.tasks, batch.labels]
        # The trainer weights a micro-batch by its share of the batch; dividing keeps the sum a sum.
        return (weights * F.cross_entropy(masked, targets, reduction="none")).sum() / batch.share
