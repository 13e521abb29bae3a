"""MbPA++: sparse replay, and adaptation to every test example on its neighbours (d'Autume et al., 2019, 1906.01076).

The memory is that of `replay`; the key of an example is its feature in the frozen backbone. While a task is trained,
`replay_rate` of the batches are drawn from the memory. For a test example with the `neighbours` nearest stored
examples N, the trained tensors theta_0 are adapted by `steps` steps of AdamW with rate `lr` on
    mean CE over N + restraint sum (theta - theta_0)^2
then the example is answered, and theta_0 is restored bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.components.features import hidden_states, mean_pool
from clpet.methods.knn import squared_distances
from clpet.methods.replay import DrawnReplay
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import AnswerSpace, Objective, Predictions
from clpet.objectives.classification import Classification
from clpet.replay.batch_plan import BatchPlan, Rows


@dataclass
class MbPA(DrawnReplay):
    """Every test example costs `steps` forward and backward passes of its neighbours, with an optimiser of its own.

    The key of a labelled text is the vector that its head reads, that of a prompt the mean of its last hidden states.
    train.select=best compares epochs without adaptation.
    """

    neighbours: int = 32
    steps: int = 30
    lr: float = 1e-3
    restraint: float = 1e-3
    replay_rate: float = 0.01

    needs_logits: ClassVar[bool] = True
    supports_plain_text: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    reads_examples: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("keys",)

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, "method.neighbours", self.neighbours, "at least 1")
        require(self.steps >= 0, "method.steps", self.steps, "0 (no adaptation) or more")
        require(self.lr > 0, "method.lr", self.lr, "more than 0")
        require(self.restraint >= 0, "method.restraint", self.restraint, "0 or more")
        require(0 <= self.replay_rate <= 1, "method.replay_rate", self.replay_rate, "in [0, 1]")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if peft.traits.full:
            raise ConfigError(
                f"method={self.name} finds neighbours by a frozen backbone, which peft={peft.name} trains: use lora"
            )

    def init_adapters(self) -> None:
        super().init_adapters()
        self.keys = torch.zeros(0, self.objective.dim, device=self.objective.device)  # [stored, dim], as memory_rows
        self.adapts = True  # whether predictions adapt

    def key(self, batch: Batch) -> Tensor:
        """[batch, dim]: features in the backbone without its adapter."""
        with self.objective.adapters.off():
            if isinstance(self.objective, Classification):
                return self.objective.features(batch)
            states = hidden_states(self.objective.adapters.model, batch)
        self.objective.count(batch, gradient=False)  # this pass does not go through the objective, which counts its own
        return mean_pool(states, batch.attention_mask)

    def stored(self) -> Rows:
        """Train rows of the memory, in the order of `keys`."""
        return self.replay.memory_rows() if self.replay.memory else np.empty(0, dtype=np.int64)

    def after_task(self, task: Task, index: int) -> None:
        before = {row: position for position, row in enumerate(self.stored().tolist())}
        super().after_task(task, index)
        rows = self.stored()
        new = np.array([row for row in rows.tolist() if row not in before], dtype=np.int64)
        positions = {**before, **{row: len(before) + i for i, row in enumerate(new.tolist())}}
        keys = torch.cat([self.keys, self.embed(new, self.key)]) if len(new) else self.keys
        self.keys = keys[[positions[row] for row in rows.tolist()]]

    def plan(self, index: int) -> BatchPlan:
        plan, rows = super().plan(index), self.stored()
        count = math.ceil(self.replay_rate * plan.steps) if len(rows) else 0
        size = min(len(rows), self.replay.batch_size)

        def epoch(number: int) -> list[Rows]:
            rng = self.replay.rng("sparse", self.replay.seed_key(index), number)
            return interleaved(plan.epoch(number), [rng.choice(rows, size, replace=False) for _ in range(count)])

        return dataclasses.replace(plan, steps=plan.steps + count, epoch=epoch) if count else plan

    def batches(self, pool: EncodedDataset, rows: Rows) -> list[Rows]:
        """Single examples, each of which has weights of its own."""
        batches = super().batches(pool, rows)
        return [batch[i : i + 1] for batch in batches for i in range(len(batch))] if self.adapts else batches

    def validate(self, index: int) -> float:
        """The score without adaptation, which would cost `steps` passes per example after every epoch."""
        self.adapts = False
        try:
            return super().validate(index)
        finally:
            self.adapts = True

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        if not (self.adapts and self.steps and len(self.keys)):
            return super().predict(batch, choices)
        parts = []
        for rows, nearest in zip(torch.arange(len(batch))[:, None], self.nearest(batch), strict=True):
            with self.adapted(nearest):
                parts.append((rows, super().predict(batch.select(rows) if len(batch) > 1 else batch, choices)))
        return Predictions.from_parts(parts)

    def nearest(self, batch: Batch) -> list[Rows]:
        """The train rows of each example's neighbours; of equal distances the earlier one in the memory counts."""
        with torch.no_grad():
            distances = squared_distances(self.key(batch).float(), self.keys)
        order = distances.sort(dim=1, stable=True).indices[:, : self.neighbours].cpu().numpy()
        return list(self.stored()[order])

    @contextmanager
    def adapted(self, rows: Rows) -> Iterator[None]:
        """Predictions inside are those of the trained tensors adapted to train rows."""
        pool, objective = self.data.train, self.objective
        parameters = self.parameters()

        def backward() -> None:
            for micro_rows in objective.micro_batches.divide(pool, rows):
                share = float(pool.weights[micro_rows].sum() / pool.weights[rows].sum())
                (objective.loss(pool.batch(micro_rows, objective.device)) * share).backward()

        before = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
                adapt(parameters, backward, optimizer, self.steps, self.restraint)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None


def adapt(
    parameters: Sequence[nn.Parameter],
    backward: Callable[[], None],
    optimizer: torch.optim.Optimizer,
    steps: int,
    restraint: float,
) -> None:
    """`steps` steps on a loss plus `restraint` times the squared distance to the values at the start.

    `backward` adds the gradients of the loss.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        backward()
        for parameter, value in zip(parameters, start, strict=True):
            distance = 2 * restraint * (parameter.detach() - value)
            parameter.grad = distance if parameter.grad is None else parameter.grad + distance
        optimizer.step()


def interleaved(new: list[Rows], old: list[Rows]) -> list[Rows]:
    """Batches of new examples with those of old ones after equal portions of them."""
    ends = [-(-(number + 1) * len(new) // max(1, len(old))) for number in range(len(old))]
    portions = [[*new[start:end], batch] for start, end, batch in zip([0, *ends], ends, old, strict=False)]
    return [batch for portion in portions for batch in portion] if old else new
