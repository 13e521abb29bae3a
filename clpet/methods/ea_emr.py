"""EA-EMR: EMR with an affine map that keeps old representations in place (ConPET's baseline, section 3.4).

logits = head(A h). A is the identity at first, frozen while a task is learned, and refitted after it so that
the new model's raw features are mapped to where the old ones lay: min mean ||A u - e||^2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.base import Choices, Predictions
from clpet.methods.replay import Replay
from clpet.replay.exemplar import FixedReplay
from clpet.training.trainer import Trainer


@dataclass
class EAEMR(Replay):
    """u: raw features under the new model. e: embeddings from before, with the A of that time.

    Of a fixed memory, A is fitted on the examples that are trained on, and copies are counted by them.
    """

    align_lr: float = 1e-4
    align_batch: int = 32
    align_epochs: int = 20

    objectives: ClassVar[tuple[str, ...]] = ("classification",)

    def __post_init__(self) -> None:
        require(self.align_lr > 0, "method.align_lr", self.align_lr, "more than 0")
        require(self.align_batch >= 1, "method.align_batch", self.align_batch, "at least 1")
        require(self.align_epochs >= 0, "method.align_epochs", self.align_epochs, "0 or more")

    def init_adapters(self) -> None:
        super().init_adapters()
        if isinstance(self.replay, FixedReplay):
            self.replay.actual_size = True
        dim, device = self.objective.dim, self.objective.device
        self.align = nn.Linear(dim, dim).to(device).requires_grad_(False)
        nn.init.eye_(self.align.weight)
        nn.init.zeros_(self.align.bias)
        self.rows = np.empty(0, dtype=np.int64)  # examples whose embeddings are held
        self.held = torch.empty(0, dim, device=device)

    def represent(self, batch: Batch) -> Tensor:
        """[batch, dim]: A h, what the head reads."""
        return self.align(self.objective.features(batch))

    def logits(self, batch: Batch) -> Tensor:
        return self.objective.head(self.represent(batch))

    def loss(self, batch: Batch) -> Tensor:
        return self.objective.cross_entropy(self.logits(batch), batch)

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        return Predictions(self.objective.head.scatter(self.represent(batch)))

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if not isinstance(self.replay, FixedReplay):  # the same drawn examples before and after training
            self.rows = trainer.rows(self.plan(index))
            self.held = self.embed(self.rows, self.represent)
        super().learn(task, index, trainer)

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        if isinstance(self.replay, FixedReplay):
            new = self.replay.memory[index]
            self.held = torch.cat([self.held, self.embed(new, self.represent)])
            self.rows = np.concatenate([self.rows, new])
            self.fit_alignment(self.embed(self.rows, self.objective.features), self.held, index)
            self.held = self.embed(self.rows, self.represent)
            return
        u = self.embed(self.rows, self.objective.features)
        fresh = torch.from_numpy(self.data.train.tasks[self.rows] == index).to(u.device)
        self.fit_alignment(u, torch.where(fresh[:, None], u, self.held), index)

    def fit_alignment(self, u: Tensor, e: Tensor, index: int) -> None:
        """Adam on mean ||A u - e||^2, from the previous A; the order is shuffled once."""
        generator = torch.Generator().manual_seed(derive(self.seed, "alignment", index))
        order = torch.randperm(len(u), generator=generator).to(u.device)
        self.align.requires_grad_(True)
        optimizer = torch.optim.Adam(self.align.parameters(), lr=self.align_lr)
        for _ in range(self.align_epochs):
            for part in order.split(self.align_batch):
                optimizer.zero_grad()
                (self.align(u[part]) - e[part]).square().sum(1).mean().backward()
                optimizer.step()
        self.align.requires_grad_(False)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + self.held.numel() + sum(p.numel() for p in self.align.parameters())

    def state_dict(self) -> dict[str, Any]:
        own = {"weight": self.align.weight, "bias": self.align.bias, "rows": self.rows.tolist(), "held": self.held}
        return {**super().state_dict(), "alignment": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own = state["alignment"]
        self.align.load_state_dict({"weight": own["weight"], "bias": own["bias"]})
        self.rows = np.array(own["rows"], dtype=np.int64)
        self.held = own["held"].to(self.objective.device)
