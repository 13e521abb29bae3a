"""EA-EMR: EMR with an affine map that aligns new representations with the old ones (baseline of ConPET, section 3.4).

logits = head(A h). A is the identity at first and frozen while a task is learned. After a task it is refitted, so that
it maps the new model's features u to the embeddings e from before the task: min_A mean ||A u - e||^2.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.replay import Replay
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.classification import Classification
from clpet.replay.exemplar import FixedReplay
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class EAEMR(Replay[Classification]):
    """u: features of the new model before A; e: embeddings A h from before the task, with the A of that time.

    With replay=fixed A is fitted on the examples of the training memory, and the number of copies follows their count.
    """

    align_lr: float = 1e-4
    align_batch: int = 32
    align_epochs: int = 20

    needs_labels: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = (
        "align.weight=alignment.weight",
        "align.bias=alignment.bias",
        "rows=alignment.rows",
        "embeddings=alignment.held",
    )

    def __post_init__(self) -> None:
        require(self.align_lr > 0, "method.align_lr", self.align_lr, "more than 0")
        require(self.align_batch >= 1, "method.align_batch", self.align_batch, "at least 1")
        require(self.align_epochs >= 0, "method.align_epochs", self.align_epochs, "0 or more")

    def init_adapters(self) -> None:
        super().init_adapters()
        if isinstance(self.replay, FixedReplay):
            self.replay.count_actual_size = True
        dim, device = self.objective.dim, self.objective.device
        self.align = nn.Linear(dim, dim).to(device).requires_grad_(False)
        nn.init.eye_(self.align.weight)
        nn.init.zeros_(self.align.bias)
        self.rows = np.empty(0, dtype=np.int64)  # train rows whose embeddings are stored
        self.embeddings = torch.empty(0, dim, device=device)  # e of `rows`

    def represent(self, batch: Batch) -> Tensor:
        """[batch, dim]: A h, the input of the head."""
        aligned: Tensor = self.align(self.objective.features(batch))
        return aligned

    def logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.objective.head(self.represent(batch))
        return logits

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        return self.objective.cross_entropy(self.logits(batch), batch)

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        return Predictions(self.objective.head.scatter(self.represent(batch)))

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if not isinstance(self.replay, FixedReplay):  # e and u need the same drawn examples before and after training
            self.rows = trainer.rows(self.plan(index))
            self.embeddings = self.embed(self.rows, self.represent)
        super().learn(task, index, trainer)

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        if isinstance(self.replay, FixedReplay):
            new = self.replay.memory[index]
            self.embeddings = torch.cat([self.embeddings, self.embed(new, self.represent)])
            self.rows = np.concatenate([self.rows, new])
            self.fit_alignment(self.embed(self.rows, self.objective.features), self.embeddings, index)
            self.embeddings = self.embed(self.rows, self.represent)
            return
        u = self.embed(self.rows, self.objective.features)
        # Examples of the new task have no old embedding worth keeping: their target is u itself.
        is_new = torch.from_numpy(self.data.train.tasks[self.rows] == index).to(u.device)
        self.fit_alignment(u, torch.where(is_new[:, None], u, self.embeddings), index)

    def fit_alignment(self, u: Tensor, e: Tensor, index: int) -> None:
        """Minimises mean ||A u - e||^2 with Adam, starting from the previous A; u, e [n, dim] are shuffled once."""
        generator = torch.Generator().manual_seed(derive(self.seed, "alignment", index))
        order = torch.randperm(len(u), generator=generator).to(u.device)
        self.align.requires_grad_(True)
        optimizer = torch.optim.Adam(self.align.parameters(), lr=self.align_lr)
        for _ in range(self.align_epochs):
            for rows in order.split(self.align_batch):
                optimizer.zero_grad()
                (self.align(u[rows]) - e[rows]).square().sum(1).mean().backward()
                optimizer.step()
        self.align.requires_grad_(False)
