"""Replay at a rate: a fixed share of what is read in every task is old, as continual pretraining does it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.config.schema import require
from clpet.errors import ConfigError
from clpet.replay.base import NoReplay
from clpet.replay.batch_plan import BatchPlan, Rows


@dataclass
class FixedFractionReplay(NoReplay):
    """`rate` = old / all examples of an epoch; old ones come from past tasks, the base corpus, or both.

    No old example comes twice before all have come once. At rate 0 the batches are those of no replay.
    """

    name: str = "rate"
    rate: float = 0.05
    source: str = "past"

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, "replay.rate", self.rate, "in [0, 1)")
        known = ("past", "base", "both")
        require(self.source in known, "replay.source", self.source, " or ".join(known))

    def check(self, batch_size: int, objective: str) -> None:
        super().check(batch_size, objective)
        if self.source != "past" and objective != "language_modeling":
            raise ConfigError(
                f"replay.source={self.source} needs a base corpus, which {objective} does not have: take past"
            )

    def available(self) -> Rows:
        """Rows that may come back."""
        past = [self.memory[task] for task in sorted(self.memory)] if self.source != "base" else []
        return np.concatenate(
            [np.empty(0, np.int64), *past, *([self.pool.rows_of(-1)] if self.source != "past" else [])]
        )

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        new, old = self.pool.rows_of(index), self.available()
        count = round(self.rate / (1 - self.rate) * len(new)) if len(old) else 0
        if not count:
            return self.new_only_plan(index, stage)

        def epoch(number: int) -> list[Rows]:
            first, last = number * count, (number + 1) * count
            through = range(first // len(old), -(-last // len(old)))  # the turns through all old rows that it touches
            turns = [self.rng(self.seed_key(index), stage, "turn", turn).permutation(old) for turn in through]
            drawn = np.concatenate(turns)[first - through[0] * len(old) :][:count]
            rng = self.rng(self.seed_key(index), stage, number)
            return self.pool.shuffled(np.concatenate([new, drawn]), self.batch_size, rng)

        return BatchPlan(self.pool, -(-(len(new) + count) // self.batch_size), epoch)

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        if self.rate:
            self.memory[index] = self.pool.rows_of(index)
