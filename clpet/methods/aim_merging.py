"""AIMMerging: Recurrent-KIF's rounds, whose length follows the loss of old examples (Feng et al., EMNLP 2025).

From task 2 on, after every inner step, h is the loss of a random batch of the memory. With Q the interval, G the next
planned point (both in inner steps; Q = 8 and G = Q at the start of a task) and f a count of alarms,
    threshold  `alarm` times the mean of the first floor(2 Q / 3) + 1 values of h in a round
    f          + 1 for every later step with h >= threshold, or else at a step from G + Q on
A round's inner steps are over when f >= 1 at G or later, or f >= 3. Then come M = floor(Q `outer_ratio`) outer steps:
    W = W_0 + w_in t_in + w_out t_out,   (w_in, w_out) = (.5, .5) or, with Q > 70, (.4, .6)   if f > 1
                                                         (.6, .4) or, with Q > 70, (.5, .5)   if f = 1
where t_in and t_out are the changes by the two loops. With d = sum |t_in| / Q, and d' that of the round before,
    Q <- max(2, floor(Q d' / d)), and half of it if that is 64 or more        if d >= d'
    Q <- min(128, floor(Q (d' / d + e))), e = 1 for Q < 64, else .5           if d < d'
after the first `cold_start` + 1 rounds of a task; G is Q steps ahead again and f = 0.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.methods.components.importance import unflat
from clpet.methods.components.memory_gradient import memory_loss
from clpet.methods.recurrent_kif import alternate
from clpet.methods.rounds import Rounds
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.sharding.tensors import sums
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

LONG, WIDE = (
    64,
    70,
)  # intervals from which the published code shortens more and extends less, and weighs the memory more
MOST_ALARMS = 3


class ControlState(TypedDict):
    """The state of a Control inside a task."""

    interval: int
    due: int
    step: int
    alarms: int
    losses: list[float]
    changes: list[float]


@dataclass
class Control:
    """Decides when the inner steps of a round are over. One per task."""

    interval: int = 8  # Q
    shortest: int = 2
    longest: int = 128
    cold_start: int = 3
    alarm: float = 2.0
    step: int = 0  # inner steps of the task
    alarms: int = 0  # f
    losses: list[float] = field(default_factory=list)  # h at the start of the round
    changes: list[float] = field(default_factory=list)  # d of every round

    def __post_init__(self) -> None:
        self.due = self.interval  # G

    def inner_steps_are_over(self, loss: float) -> bool:
        """Counts an inner step after which the memory's loss is `loss`. One that is NaN raises no alarm."""
        self.step += 1
        if len(self.losses) < 2 * self.interval // 3 + 1:
            self.losses.append(loss)
        else:
            high = loss >= self.alarm * float(np.mean(self.losses))
            self.alarms += high or self.step >= self.due + self.interval
        return (self.step >= self.due and self.alarms >= 1) or self.alarms >= MOST_ALARMS

    def weights(self) -> tuple[float, float]:
        """(w_in, w_out) of the round that ends."""
        if self.alarms > 1:
            return (0.5, 0.5) if self.interval <= WIDE else (0.4, 0.6)
        return (0.6, 0.4) if self.interval <= WIDE else (0.5, 0.5)

    def start_round(self, change: float) -> None:
        """Starts the next round; `change` is sum |t_in| of the one that ends, whose planned length divides it."""
        change /= self.interval
        if len(self.changes) > self.cold_start:
            self.interval = self.next_interval(change, self.changes[-1])
        self.changes.append(change)
        self.due, self.alarms, self.losses = self.step + self.interval, 0, []

    def next_interval(self, change: float, before: float) -> int:
        """Q from d and d'; unchanged where d' = 0."""
        if before == 0:
            return self.interval
        if change >= before:
            shorter = max(self.shortest, int(self.interval * before / change))
            return shorter // 2 if shorter >= LONG else shorter
        extra = 1 if self.interval < LONG else 0.5
        longer = self.interval * (before / change + extra) if change else self.longest
        return int(min(self.longest, longer))

    def state(self) -> ControlState:
        """Everything that an interrupted task needs to resume."""
        return {
            "interval": self.interval, "due": self.due, "step": self.step, "alarms": self.alarms,
            "losses": [*self.losses], "changes": [*self.changes],
        }  # fmt: skip

    def load(self, state: ControlState) -> None:
        """Restores what `state` returned."""
        self.interval, self.due, self.step = state["interval"], state["due"], state["step"]
        self.alarms, self.losses, self.changes = state["alarms"], [*state["losses"]], [*state["changes"]]


@dataclass
class AIMMerging(Rounds):
    """Outer steps are inserted between the batches of the plan, which has new examples alone."""

    interval: int = 8
    outer_ratio: float = 1.0
    shortest: int = 2
    longest: int = 128
    cold_start: int = 3
    alarm: float = 2.0

    saved_in_task: ClassVar[tuple[str, ...]] = ("control", "outer_left", "outer_done")

    def __post_init__(self) -> None:
        require(self.shortest >= 1, "method.shortest", self.shortest, "at least 1")
        require(self.shortest <= self.interval <= self.longest, "method.interval", self.interval,
                f"from method.shortest={self.shortest} to method.longest={self.longest}")  # fmt: skip
        require(self.outer_ratio > 0, "method.outer_ratio", self.outer_ratio, "more than 0")
        require(self.cold_start >= 0, "method.cold_start", self.cold_start, "0 or more")
        require(self.alarm > 0, "method.alarm", self.alarm, "more than 0")

    def plan(self, index: int) -> BatchPlan:
        return self.replay.new_only_plan(index)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        """An estimate: rounds that all have the first interval."""
        new = self.plan(index)
        if not self.replay.memory:
            return {"": new}
        return {"": alternate(new, self.replay.memory_only_plan(index), self.interval, self.outer_steps(self.interval))}

    def outer_steps(self, interval: int) -> int:
        """M = floor(Q `outer_ratio`), but at least 1."""
        return max(1, int(interval * self.outer_ratio))

    def hooks(self, index: int) -> StepHooks:
        hooks = super().hooks(index)
        hooks.insert = self.next_outer_batch
        return hooks

    def start_rounds(self, index: int) -> None:
        super().start_rounds(index)
        self.control = Control(self.interval, self.shortest, self.longest, self.cold_start, self.alarm)
        self.outer_left = self.outer_done = 0  # steps ahead in this round, and those of the whole task so far
        self.old = self.replay.memory_only_plan(index) if self.replay.memory else None
        self.old_epoch = lru_cache(maxsize=1)(self.old.epoch) if self.old else None

    def fit(self, trainer: Trainer, index: int) -> None:
        super().fit(trainer, index)
        self.statistics |= {"outer_steps": float(self.outer_done), "last_interval": float(self.control.interval)}

    def next_outer_batch(self) -> np.ndarray | None:
        """Rows of the memory for the next step, if the inner steps of a round are over."""
        if not self.outer_left or self.old is None or self.old_epoch is None:
            return None
        epoch, number = divmod(self.outer_done, self.old.steps)
        return self.old_epoch(epoch)[number]

    @property
    def in_outer_loop(self) -> bool:
        return self.outer_left > 0

    def loop_is_over(self, context: StepContext) -> bool:
        if self.outer_left:
            self.outer_left, self.outer_done = self.outer_left - 1, self.outer_done + 1
            return not self.outer_left
        ended = self.control.inner_steps_are_over(memory_loss(self, self.watched_rows(context.task)))
        self.outer_left = self.outer_steps(self.control.interval) if ended else 0
        return ended

    def watched_rows(self, task: int) -> np.ndarray:
        """Random rows of the memory; a resumed run draws the same ones."""
        rows = self.replay.memory_rows()
        rng = np.random.default_rng(derive(self.seed, "aim_merging", task, self.control.step))
        return rng.choice(rows, min(len(rows), self.replay.batch_size), replace=False)

    def fused(self, inner: Tensor, outer: Tensor) -> Tensor:
        inner_weight, outer_weight = self.control.weights()
        changes = unflat(inner.abs(), self.live)
        total = sums([(self.live[name], change.sum()) for name, change in changes.items()])
        self.control.start_round(torch.stack(total).sum().item())
        return inner_weight * inner + outer_weight * outer
