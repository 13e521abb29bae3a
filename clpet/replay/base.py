"""Replay: which old examples come back, and how they are mixed with the new task's.

A replay component keeps row numbers of the train pool, never text. `plan` gives the batches of one task;
`update_memory` is called after it. The rng streams come from (seed, task, epoch): nothing depends on what
another component drew.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clpet.config.seeding import derive
from clpet.data.batches import Encoded, EncodedDataset
from clpet.errors import ConfigError
from clpet.replay.batch_plan import BatchPlan, Rows

log = logging.getLogger(__name__)

ValidationRows = list[tuple[EncodedDataset, Rows]]  # validation examples: pools and rows


@dataclass
class NoReplay:
    """The new task alone."""

    name: str = "none"

    @property
    def by_class(self) -> bool:
        """Whether what it keeps is chosen by class."""
        return False

    def check(self, batch_size: int, objective: str) -> None:
        """Raises ConfigError for a batch or an objective this component does not fit, before anything is loaded."""
        if self.by_class and objective != "classification":
            raise ConfigError(
                f"replay={self.name} chooses its memory by class logits, which {objective} does not have: "
                "take replay=share, dynamic, reservoir or all"
            )

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        """Called once, before the first task."""
        self.pool, self.val_pool, self.seed, self.batch_size = data.train, data.validation, seed, batch_size
        self.seed_key = data.seed_key
        self.cluster_seed = seed % 2**32
        self.memory: dict[int, Rows] = {}  # task -> rows of the pool that may come back

    def rng(self, *names: object) -> np.random.Generator:
        """A generator for one purpose."""
        return np.random.default_rng(derive(self.seed, "replay", *names))

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        """Batches for task `index`; two stages of one task draw differently."""
        return self.new_only_plan(index, stage)

    def new_only_plan(self, index: int, stage: str = "") -> BatchPlan:
        """The new task's examples without any old ones."""
        return self._shuffled(self.pool.rows_of(index), index, stage)

    def memory_only_plan(self, index: int) -> BatchPlan:
        """The memory's examples without any new ones."""
        return self._shuffled(self.memory_rows(), index, "recall")

    def memory_rows(self) -> Rows:
        """All rows of the memory, task by task."""
        return np.concatenate([self.memory[task] for task in sorted(self.memory)])

    def validation(self, index: int) -> ValidationRows:
        """What the best epoch of task `index` is chosen on: the new task's validation part."""
        return [(self.val_pool, self.val_pool.rows_of(index))]

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        """Keeps what this component keeps of task `index`; `features` gives [n, dim] vectors of train rows."""

    def state(self) -> dict[str, Any]:
        """What a later task needs, as lists."""
        return {"memory": {str(task): rows.tolist() for task, rows in self.memory.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.memory = {int(task): np.array(rows, dtype=np.int64) for task, rows in state["memory"].items()}

    def stored(self) -> int:
        """Number of old examples kept."""
        return sum(len(rows) for rows in self.memory.values())

    def _shuffled(self, rows: Rows, index: int, stage: str, extra: Rows | None = None) -> BatchPlan:
        rows = rows if extra is None else np.concatenate([rows, extra])
        return BatchPlan(
            self.pool,
            -(-len(rows) // self.batch_size),
            lambda epoch: self.pool.shuffled(rows, self.batch_size, self.rng(self.seed_key(index), stage, epoch)),
        )


@dataclass
class AllReplay(NoReplay):
    """All data of all tasks so far, shuffled: the cost of a task grows with the tasks before it."""

    name: str = "all"

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        return self._shuffled(self.pool.rows_of(*range(index + 1)), index, stage)

    def validation(self, index: int) -> ValidationRows:
        return [(self.val_pool, self.val_pool.rows_of(*range(index + 1)))]

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        self.memory[index] = self.pool.rows_of(index)
