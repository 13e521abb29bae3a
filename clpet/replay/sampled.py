"""Replay that draws old examples at random at every step."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.config.schema import require
from clpet.data.batches import Encoded
from clpet.data.traits import Traits
from clpet.errors import ConfigError, need_package
from clpet.replay.base import NoReplay, ReplayState, ValidationRows
from clpet.replay.batch_plan import BatchPlan, Rows, split_batch, steps_and_val_batches
from clpet.replay.exemplar_selection import select_per_class

log = logging.getLogger(__name__)

EVAL_BATCH = 32  # examples per validation batch in ConPET


@dataclass
class SampledReplay(NoReplay):
    """Every batch contains new examples and old ones drawn from `memory`, which subclasses fill.

    `limit` = L gives 4L // 5 steps per epoch; with null every new example is used about once. The first task has
    ordinary shuffled epochs. `ratio` r > 0 is new:old in a batch, r < 0 is old:new = |r|.
    """

    name: str = "drawn"
    ratio: float = 1.0
    limit: int | None = None

    @property
    def keeps_history(self) -> bool:
        """Whether all old examples may be replayed."""
        return False

    def with_ratio(self, ratio: float | None) -> "SampledReplay":
        """Returns a component with the same memory and another ratio; None: with the same ratio."""
        other = copy.copy(self)
        other.ratio = ratio or self.ratio
        return other

    def __post_init__(self) -> None:
        require(self.ratio != 0, "replay.ratio", self.ratio, "positive (new:old) or negative (old:new)")
        require(self.limit is None or self.limit >= 2, "replay.limit", self.limit, "at least 2, or null")

    def check(self, batch_size: int, traits: Traits) -> None:
        super().check(batch_size, traits)
        if self.selects_by_class:
            need_package("sklearn", "sklearn", f"replay={self.name} with a memory selected by k-means")
        new, old = split_batch(batch_size, self.ratio)
        if new < 1 or old < 1:
            raise ConfigError(
                f"replay.ratio={self.ratio} splits train.global_batch_size={batch_size} into {new} new and {old} old "
                "examples: both must be at least 1"
            )

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        if not self.memory:
            return super().plan(index, stage)
        new = self.pool.rows_of(index)
        n_new, _ = split_batch(self.batch_size, self.ratio)
        if len(new) < n_new:
            repeats = "task %d has %d examples, but a batch needs %d new ones: examples repeat within a batch"
            log.warning(repeats, index + 1, len(new), n_new)
        steps = -(-len(new) // n_new) if self.limit is None else steps_and_val_batches(self.limit)[0]
        return BatchPlan(
            self.pool, steps, lambda epoch: self.draw(new, steps, self.rng(self.seed_key(index), stage, epoch))
        )

    def validation(self, index: int) -> ValidationRows:
        """L // 5 batches of 32, half new and half old, drawn once per task; without a limit all validation examples."""
        if not self.keeps_history or not self.memory:
            return super().validation(index)  # a small memory stores no validation examples
        if self.limit is None:
            return [(self.val_pool, self.val_pool.rows_of(*range(index + 1)))]
        rng, size = self.rng(index, "validation"), steps_and_val_batches(self.limit)[1] * EVAL_BATCH
        new, old = self.val_pool.rows_of(index), [self.val_pool.rows_of(task) for task in range(index)]
        fresh = rng.choice(new, size - size // 2, replace=True)
        drawn = [rng.choice(old[task]) for task in rng.integers(len(old), size=size // 2)]
        return [(self.val_pool, np.concatenate([fresh, np.array(drawn, dtype=np.int64)]))]

    def draw(self, new: Rows, steps: int, rng: np.random.Generator) -> list[Rows]:
        """Returns `steps` batches, new rows first.

        New examples are distinct within a batch; for each old one a task is drawn, then an example of it.
        """
        n_new, n_old = split_batch(self.batch_size, self.ratio)
        old = [self.memory[task] for task in sorted(self.memory)]
        sizes = np.array([len(rows) for rows in old])
        batches = []
        for _ in range(steps):
            fresh = rng.choice(new, n_new, replace=len(new) < n_new)
            tasks = rng.integers(len(old), size=n_old)
            offsets = rng.integers(sizes[tasks])
            drawn = np.array([old[task][offset] for task, offset in zip(tasks, offsets, strict=True)], dtype=np.int64)
            batches.append(np.concatenate([fresh, drawn]))
        return batches


@dataclass
class DynamicReplay(SampledReplay):
    """Dynamic sampling (ConPET, section 3.1): an old example is drawn uniformly over tasks, then within the task.

    `kind=history` stores all old examples (storage grows, compute does not); `fixed` draws from a memory selected per
    class by k-means.
    """

    name: str = "dynamic"
    kind: str = "history"
    per_class: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in ("history", "fixed"), "replay.kind", self.kind, "history or fixed")
        require(self.per_class >= 1, "replay.per_class", self.per_class, "at least 1")

    @property
    def keeps_history(self) -> bool:
        return self.kind == "history"

    @property
    def selects_by_class(self) -> bool:
        return self.kind == "fixed"

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rows = self.pool.rows_of(index)
        if self.kind == "fixed":
            vectors, seed, rng = features, self.cluster_seed, self.rng(index)
            rows = np.unique(select_per_class(self.pool, rows, self.per_class, "kmeans", vectors, seed, rng))
        self.memory[index] = rows


@dataclass
class ReservoirReplay(SampledReplay):
    """Reservoir sampling (Vitter, 1985): a uniform sample of constant size of all examples seen."""

    name: str = "reservoir"
    capacity: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.capacity >= 1, "replay.capacity", self.capacity, "at least 1")

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.num_seen = 0

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rng = self.rng("reservoir", index)
        self.offer(rng.permutation(self.pool.rows_of(index)), rng)

    def offer(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Offers rows in their order; returns the slot that each has entered, -1 for those that are not stored.

        Algorithm R: example number n enters with probability capacity / n, in the slot of a random one.
        """
        reservoir = self.memory.get(0, np.empty(0, dtype=np.int64)).tolist()
        slots = np.full(len(rows), -1)
        for position, row in enumerate(rows.tolist()):
            self.num_seen += 1
            if len(reservoir) < self.capacity:
                slots[position] = len(reservoir)
                reservoir.append(row)
            elif (slot := int(rng.integers(self.num_seen))) < self.capacity:
                slots[position] = slot
                reservoir[slot] = row
        self.memory = {0: np.array(reservoir, dtype=np.int64)}
        return slots

    def state(self) -> ReplayState:
        return {**super().state(), "passed": self.num_seen}

    def load(self, state: ReplayState) -> None:
        super().load(state)
        self.num_seen = int(state["passed"])
