"""Replays labels of a reservoir, and the logits from the end of their task."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clpet.data.benchmark import Task
from clpet.methods.replay import Replay
from clpet.training.step import StepContext


@dataclass
class StoredLogits(Replay):
    """L = mean over the batch of CE + alpha (z - z_stored)^2, the second term for old examples.

    Old examples come in the batches of `replay`, so labels and logits share one forward pass. The logits are those of
    the model at the end of the task, over the labels that it had seen.
    """

    alpha: float = 0.5

    needs_labels: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("logits_stored",)

    def init_adapters(self) -> None:
        super().init_adapters()
        size = len(self.data.train), len(self.benchmark.labels)
        self.logits_stored = torch.full(size, float("nan"), device=self.objective.device)  # NaN: nothing is stored

    def loss(self, context: StepContext) -> Tensor:
        logits = self.logits(context.batch)
        rows = torch.from_numpy(context.batch.rows).to(logits.device)
        stored = self.logits_stored[rows, : logits.shape[1]]
        is_stored = ~stored.isnan()
        squares = torch.where(is_stored, logits - stored.nan_to_num(), 0.0).square().sum(1) / is_stored.sum(1).clamp(
            min=1
        )
        return self.objective.cross_entropy(logits, context.batch) + self.alpha * squares.mean()

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        rows = torch.from_numpy(self.replay.memory_rows())
        rows = rows[self.logits_stored[rows].isnan().all(1).cpu()]  # the examples that are new in the memory
        logits = self.embed(rows.numpy(), self.logits)
        self.logits_stored[rows, : logits.shape[1]] = logits
