"""Replay at a fixed fraction: in every task the same share of the training examples is old (continual pretraining)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.config.schema import require
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.replay.base import NoReplay
from clpet.replay.batch_plan import BatchPlan, Rows


@dataclass
class FixedFractionReplay(NoReplay):
    """`rate` = old / all examples of an epoch; old examples come from past tasks, the base corpus, or both.

    Every old example is used once before any is used again. At rate 0 the batches equal those without replay.
    """

    name: str = "rate"
    rate: float = 0.05
    source: str = "past"

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, "replay.rate", self.rate, "in [0, 1)")
        sources = ("past", "base", "both")
        require(self.source in sources, "replay.source", self.source, " or ".join(sources))

    def check(self, batch_size: int, traits: Traits) -> None:
        super().check(batch_size, traits)
        if self.source != "past" and not traits.plain_text:
            raise ConfigError(f"replay.source={self.source} needs a base corpus, which only plain text has: use past")

    def available(self) -> Rows:
        """The rows that may be replayed."""
        past_rows = [self.memory[task] for task in sorted(self.memory)] if self.source != "base" else []
        base_rows = [self.pool.rows_of(-1)] if self.source != "past" else []  # the base corpus is task -1
        return np.concatenate([np.empty(0, np.int64), *past_rows, *base_rows])

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        new, old = self.pool.rows_of(index), self.available()
        # rate = old / (new + old), so old = rate / (1 - rate) new.
        count = round(self.rate / (1 - self.rate) * len(new)) if len(old) else 0
        if not count:
            return self.new_only_plan(index, stage)

        def epoch(number: int) -> list[Rows]:
            # The epochs read one endless sequence of permutations of the old rows: this one from `first` to `last`.
            first, last = number * count, (number + 1) * count
            permutations = range(first // len(old), -(-last // len(old)))  # those that contain this epoch's stretch
            shuffled = [self.rng(self.seed_key(index), stage, "turn", turn).permutation(old) for turn in permutations]
            drawn = np.concatenate(shuffled)[first - permutations[0] * len(old) :][:count]
            rng = self.rng(self.seed_key(index), stage, number)
            return self.pool.shuffled(np.concatenate([new, drawn]), self.batch_size, rng)

        return BatchPlan(self.pool, -(-(len(new) + count) // self.batch_size), epoch)

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        if self.rate:
            self.memory[index] = self.pool.rows_of(index)
