"""Replay: which old examples come back, and how they are mixed with the new task's.

A replay component keeps row numbers of the train pool, never text. `plan` gives the batches of one task;
`remember` is called after it. The rng streams come from (seed, task, epoch): nothing depends on what
another component drew.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Encoded, EncodedDataset
from clpet.errors import ConfigError
from clpet.replay.batch_plan import Plan, Rows, equal_compute, split_batch, split_limit
from clpet.replay.exemplar_selection import divided, select_per_class, stratified

log = logging.getLogger(__name__)

Held = list[tuple[EncodedDataset, Rows]]  # validation examples: pools and rows
EVAL_BATCH = 32  # examples of a validation batch in ConPET's counts


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
        self.pool, self.held, self.seed, self.batch_size = data.train, data.validation, seed, batch_size
        self.key = data.key
        self.cluster_seed = seed % 2**32
        self.memory: dict[int, Rows] = {}  # task -> rows of the pool that may come back

    def rng(self, *names: object) -> np.random.Generator:
        """A generator for one purpose."""
        return np.random.default_rng(derive(self.seed, "replay", *names))

    def plan(self, index: int, stage: str = "") -> Plan:
        """Batches for task `index`; two stages of one task draw differently."""
        return self.alone(index, stage)

    def alone(self, index: int, stage: str = "") -> Plan:
        """The new task's examples without any old ones."""
        return self._shuffled(self.pool.rows_of(index), index, stage)

    def recall(self, index: int) -> Plan:
        """The memory's examples without any new ones."""
        return self._shuffled(self.old(), index, "recall")

    def old(self) -> Rows:
        """All rows of the memory, task by task."""
        return np.concatenate([self.memory[task] for task in sorted(self.memory)])

    def validation(self, index: int) -> Held:
        """What the best epoch of task `index` is chosen on: the new task's validation part."""
        return [(self.held, self.held.rows_of(index))]

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
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

    def _shuffled(self, rows: Rows, index: int, stage: str, extra: Rows | None = None) -> Plan:
        rows = rows if extra is None else np.concatenate([rows, extra])
        return Plan(
            self.pool,
            -(-len(rows) // self.batch_size),
            lambda epoch: self.pool.shuffled(rows, self.batch_size, self.rng(self.key(index), stage, epoch)),
        )


@dataclass
class AllReplay(NoReplay):
    """All data of all tasks so far, shuffled: the cost of a task grows with the tasks before it."""

    name: str = "all"

    def plan(self, index: int, stage: str = "") -> Plan:
        return self._shuffled(self.pool.rows_of(*range(index + 1)), index, stage)

    def validation(self, index: int) -> Held:
        return [(self.held, self.held.rows_of(*range(index + 1)))]

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        self.memory[index] = self.pool.rows_of(index)


@dataclass
class DrawnReplay(NoReplay):
    """Every step mixes new examples with old ones drawn anew; what may be drawn is a subclass's `memory`.

    `limit` = L gives 4L // 5 steps an epoch; null as many as show every new example about once. Task 1 is an
    ordinary shuffled epoch.
    """

    name: str = "drawn"
    ratio: float = 1.0
    limit: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether the whole history may come back."""
        return False

    def mixed(self, ratio: float | None) -> "DrawnReplay":
        """The same memory with another share of old examples in a batch; None: with the same share."""
        other = copy.copy(self)
        other.ratio = ratio or self.ratio
        return other

    def __post_init__(self) -> None:
        require(self.ratio != 0, "replay.ratio", self.ratio, "positive (new:old) or negative (old:new)")
        require(self.limit is None or self.limit >= 2, "replay.limit", self.limit, "at least 2, or null")

    def check(self, batch_size: int, objective: str) -> None:
        super().check(batch_size, objective)
        new, old = split_batch(batch_size, self.ratio)
        if new < 1 or old < 1:
            raise ConfigError(
                f"replay.ratio={self.ratio} splits train.global_batch_size={batch_size} into {new} new and {old} old "
                "examples: both must be at least 1"
            )

    def plan(self, index: int, stage: str = "") -> Plan:
        if not self.memory:
            return super().plan(index, stage)
        new = self.pool.rows_of(index)
        new_places, _ = split_batch(self.batch_size, self.ratio)
        if len(new) < new_places:
            repeats = "task %d has %d examples for %d places of a batch: they repeat"
            log.warning(repeats, index + 1, len(new), new_places)
        steps = -(-len(new) // new_places) if self.limit is None else split_limit(self.limit)[0]
        return Plan(self.pool, steps, lambda epoch: self.draw(new, steps, self.rng(self.key(index), stage, epoch)))

    def validation(self, index: int) -> Held:
        """L // 5 batches of 32, half new and half old, drawn once per task; all validation parts without a limit."""
        if not self.keeps_all or not self.memory:
            return super().validation(index)  # a small memory has no old validation examples
        if self.limit is None:
            return [(self.held, self.held.rows_of(*range(index + 1)))]
        rng, size = self.rng(index, "validation"), split_limit(self.limit)[1] * EVAL_BATCH
        new, old = self.held.rows_of(index), [self.held.rows_of(task) for task in range(index)]
        fresh = rng.choice(new, size - size // 2, replace=True)
        drawn = [rng.choice(old[task]) for task in rng.integers(len(old), size=size // 2)]
        return [(self.held, np.concatenate([fresh, np.array(drawn, dtype=np.int64)]))]

    def draw(self, new: Rows, steps: int, rng: np.random.Generator) -> list[Rows]:
        """`steps` batches, the new rows first: distinct new examples, independent old draws (task, then example)."""
        n_new, n_old = split_batch(self.batch_size, self.ratio)
        old = [self.memory[task] for task in sorted(self.memory)]
        sizes = np.array([len(rows) for rows in old])
        batches = []
        for _ in range(steps):
            fresh = rng.choice(new, n_new, replace=len(new) < n_new)
            tasks = rng.integers(len(old), size=n_old)
            places = rng.integers(sizes[tasks])
            drawn = np.array([old[task][place] for task, place in zip(tasks, places, strict=True)], dtype=np.int64)
            batches.append(np.concatenate([fresh, drawn]))
        return batches


@dataclass
class DynamicReplay(DrawnReplay):
    """Dynamic sampling (ConPET, section 3.1): old draws are uniform over tasks, then over a task's examples.

    `kind=history` keeps all old examples (storage grows, compute does not); `fixed` draws from a memory chosen
    per class by k-means.
    """

    name: str = "dynamic"
    kind: str = "history"
    per_class: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in ("history", "fixed"), "replay.kind", self.kind, "history or fixed")
        require(self.per_class >= 1, "replay.per_class", self.per_class, "at least 1")

    @property
    def keeps_all(self) -> bool:
        return self.kind == "history"

    @property
    def by_class(self) -> bool:
        return self.kind == "fixed"

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rows = self.pool.rows_of(index)
        if self.kind == "fixed":
            vectors, seed, rng = features, self.cluster_seed, self.rng(index)
            rows = np.unique(select_per_class(self.pool, rows, self.per_class, "kmeans", vectors, seed, rng))
        self.memory[index] = rows


@dataclass
class FixedReplay(NoReplay):
    """A small memory chosen once per task, mixed into the new data as `copies` of itself (ConPET, 3.2 and 3.3).

    `train_share` of the kept examples are trained on, the rest is for validation. copies=null takes the f of
    ConPET that equals the compute of dynamic sampling at `limit` = L, and `max_copies` where the new data alone
    fill an epoch; without a limit about as many old as new examples an epoch.
    """

    name: str = "fixed"
    selection: str = "kmeans"
    per_class: int = 20
    train_share: float = 0.8
    copies: int | None = None
    max_copies: int = 5
    limit: int | None = None

    def __post_init__(self) -> None:
        known = ("kmeans", "random", "herding")
        require(self.selection in known, "replay.selection", self.selection, " or ".join(known))
        require(self.per_class >= 1, "replay.per_class", self.per_class, "at least 1")
        require(0 < self.train_share <= 1, "replay.train_share", self.train_share, "in (0, 1]")
        require(self.max_copies >= 1, "replay.max_copies", self.max_copies, "at least 1")
        require(self.copies is None or self.copies >= 1, "replay.copies", self.copies, "at least 1, or null")

    @property
    def by_class(self) -> bool:
        return True

    def plan(self, index: int, stage: str = "") -> Plan:
        if not self.memory:
            return super().plan(index, stage)
        new, old = self.pool.rows_of(index), self.old()
        return self._shuffled(new, index, stage, extra=np.tile(old, self._copies(len(new), old)))

    def _copies(self, new: int, old: Rows) -> int:
        if self.copies is not None:
            return self.copies
        if self.limit is None:
            return max(1, min(self.max_copies, round(new / len(old))))
        full = -(-4 * self.per_class // 5) * len(np.unique(self.pool.labels[old]))
        memory = len(old) if self.actual_size else full
        return equal_compute(new, memory, self.limit, self.batch_size, self.max_copies)

    def validation(self, index: int) -> Held:
        """The new task's validation part and the validation share of the memories."""
        kept = [(self.pool, np.concatenate([self.spare[task] for task in sorted(self.spare)]))] if self.spare else []
        return [(self.held, self.held.rows_of(index)), *kept]

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.spare: dict[int, Rows] = {}  # task -> kept rows that only validate
        self.actual_size = False  # copies are counted by the memory as it is, not by ceil(0.8 m) examples a class

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rng = self.rng(index)
        rows = self.pool.rows_of(index)
        parts = []
        for label in np.unique(self.pool.labels[rows]):
            own = rows[self.pool.labels[rows] == label]
            kept = select_per_class(self.pool, own, self.per_class, self.selection, features, self.cluster_seed, rng)
            parts.append(divided(kept, self.train_share, rng))
        self.memory[index] = np.sort(np.concatenate([train for train, _ in parts]))
        self.spare[index] = np.sort(np.concatenate([spare for _, spare in parts]))

    def stored(self) -> int:
        return super().stored() + sum(len(rows) for rows in self.spare.values())

    def state(self) -> dict[str, Any]:
        return {**super().state(), "spare": {str(task): rows.tolist() for task, rows in self.spare.items()}}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.spare = {int(task): np.array(rows, dtype=np.int64) for task, rows in state["spare"].items()}


@dataclass
class ShareReplay(NoReplay):
    """A share of every task, spread over its labels, mixed into the new data once an epoch (MixReplay)."""

    name: str = "share"
    share: float = 0.02

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "replay.share", self.share, "in [0, 1]")

    def plan(self, index: int, stage: str = "") -> Plan:
        return self._shuffled(self.pool.rows_of(index), index, stage, extra=self.old() if self.memory else None)

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rows = self.pool.rows_of(index)
        if self.share:
            self.memory[index] = stratified(self.pool.labels, rows, self.share, self.rng(index))


@dataclass
class ReservoirReplay(DrawnReplay):
    """A uniform sample of everything seen, of constant size (Vitter, 1985); drawn from uniformly at every step."""

    name: str = "reservoir"
    capacity: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.capacity >= 1, "replay.capacity", self.capacity, "at least 1")

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.passed = 0

    def remember(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        kept, rng = self.memory.get(0, np.empty(0, dtype=np.int64)).tolist(), self.rng("reservoir", index)
        for row in rng.permutation(self.pool.rows_of(index)):
            self.passed += 1
            if len(kept) < self.capacity:
                kept.append(row)
            elif (place := int(rng.integers(self.passed))) < self.capacity:
                kept[place] = row
        self.memory = {0: np.array(kept, dtype=np.int64)}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "passed": self.passed}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.passed = int(state["passed"])
