"""Replay: which old examples are trained on again, and how they are mixed with those of the new task.

A replay component stores row numbers of the training pool, never text. `plan` gives the batches of a task, and
`update_memory` is called after it. All random numbers come from (seed, task, epoch), so no component depends on
how many numbers another one has drawn.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from clpet.config.seeding import derive
from clpet.data.batches import Encoded, EncodedDataset
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.replay.batch_plan import BatchPlan, Rows

log = logging.getLogger(__name__)

ValidationRows = list[tuple[EncodedDataset, Rows]]  # validation examples as (pool, rows) pairs


class ReplayState(TypedDict):
    """The state of a memory: row numbers of the pool by task. The keys are those of checkpoints of version 0.1.0."""

    memory: dict[str, list[int]]
    spare: NotRequired[dict[str, list[int]]]  # examples for validation
    passed: NotRequired[int]  # how many examples a reservoir has seen


@dataclass
class NoReplay:
    """Only the examples of the new task; also the base class of all replay components."""

    name: str = "none"

    @property
    def selects_by_class(self) -> bool:
        """Whether the memory is selected per class."""
        return False

    def check(self, batch_size: int, traits: Traits) -> None:
        """Raises ConfigError if this component does not support the batch size or objective; needs no data."""
        if self.selects_by_class and not traits.has_labels:
            raise ConfigError(
                f"replay={self.name} chooses its memory by class logits, which this objective does not have: "
                "use replay=share, dynamic, reservoir or all"
            )

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        """Called once, before the first task."""
        self.pool, self.val_pool, self.seed, self.batch_size = data.train, data.validation, seed, batch_size
        self.seed_key = data.seed_key
        self.cluster_seed = seed % 2**32  # scikit-learn takes 32 bits
        self.memory: dict[int, Rows] = {}  # {task: rows of the pool that may be replayed}
        self.held_out: Rows = np.empty(0, dtype=np.int64)  # rows that a method keeps out of the batches of new examples

    def rng(self, *names: object) -> np.random.Generator:
        """A random generator for the purpose given by `names`."""
        return np.random.default_rng(derive(self.seed, "replay", *names))

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        """The batches of task `index`; the stages of a task draw different batches."""
        return self.new_only_plan(index, stage)

    def new_only_plan(self, index: int, stage: str = "") -> BatchPlan:
        """The batches of task `index` without old examples."""
        return self._shuffled(self.new_rows(index), index, stage)

    def new_rows(self, index: int) -> Rows:
        """The rows of task `index` that are trained on as new ones."""
        rows = self.pool.rows_of(index)
        return rows[~np.isin(rows, self.held_out)] if len(self.held_out) else rows

    def memory_only_plan(self, index: int) -> BatchPlan:
        """The batches of the memory without examples of task `index`."""
        return self._shuffled(self.memory_rows(), index, "recall")

    def memory_rows(self) -> Rows:
        """All rows of the memory, ordered by task."""
        return np.concatenate([self.memory[task] for task in sorted(self.memory)])

    def validation(self, index: int) -> ValidationRows:
        """The examples on which the best epoch of task `index` is chosen; here the validation split of that task."""
        return [(self.val_pool, self.val_pool.rows_of(index))]

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        """Adds examples of task `index` to the memory; `features` returns [n, dim] vectors of n rows of the pool."""

    def state(self) -> ReplayState:
        """Returns what later tasks need, as lists."""
        return {"memory": {str(task): rows.tolist() for task, rows in self.memory.items()}}

    def load(self, state: ReplayState) -> None:
        """Restores what `state` returned."""
        self.memory = {int(task): np.array(rows, dtype=np.int64) for task, rows in state["memory"].items()}

    def stored(self) -> int:
        """Number of stored examples."""
        return len(self.stored_rows())

    def stored_rows(self) -> Rows:
        """Rows of the pool that are stored."""
        return np.concatenate([np.empty(0, np.int64), *self.memory.values()])

    def _shuffled(self, rows: Rows, index: int, stage: str, extra: Rows | None = None) -> BatchPlan:
        """Every row once per epoch, in a new order in each; `extra` may contain a row several times."""
        rows = rows if extra is None else np.concatenate([rows, extra])
        return BatchPlan(
            self.pool,
            -(-len(rows) // self.batch_size),
            lambda epoch: self.pool.shuffled(rows, self.batch_size, self.rng(self.seed_key(index), stage, epoch)),
        )


@dataclass
class AllReplay(NoReplay):
    """All examples of all tasks so far, shuffled: the cost of a task grows with the number of tasks before it."""

    name: str = "all"

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        return self._shuffled(self.pool.rows_of(*range(index + 1)), index, stage)

    def validation(self, index: int) -> ValidationRows:
        return [(self.val_pool, self.val_pool.rows_of(*range(index + 1)))]

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        self.memory[index] = self.pool.rows_of(index)
