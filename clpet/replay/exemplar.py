"""Replay of a small memory that is selected once, after each task."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.config.schema import require
from clpet.data.batches import Encoded
from clpet.data.traits import Traits
from clpet.errors import need_package
from clpet.replay.base import NoReplay, ReplayState, ValidationRows
from clpet.replay.batch_plan import BatchPlan, Rows, copies_for_equal_compute
from clpet.replay.exemplar_selection import select_per_class, split_train_val, stratified_sample


@dataclass
class FixedReplay(NoReplay):
    """A memory selected per class after each task, mixed `copies` times into the new data (ConPET, 3.2 and 3.3).

    `train_share` of the selected examples are trained on, the others are for validation. With copies=null and `limit`
    = L, copies is ConPET's f, which equals the compute of dynamic sampling at L (`max_copies` where the new data alone
    reach it). With neither, an epoch has about as many old as new examples, but at most `max_copies` of each.
    """

    name: str = "fixed"
    selection: str = "kmeans"
    per_class: int = 20
    train_share: float = 0.8
    copies: int | None = None
    max_copies: int = 5
    limit: int | None = None

    def __post_init__(self) -> None:
        selections = ("kmeans", "random", "herding")
        require(self.selection in selections, "replay.selection", self.selection, " or ".join(selections))
        require(self.per_class >= 1, "replay.per_class", self.per_class, "at least 1")
        require(0 < self.train_share <= 1, "replay.train_share", self.train_share, "in (0, 1]")
        require(self.max_copies >= 1, "replay.max_copies", self.max_copies, "at least 1")
        require(self.copies is None or self.copies >= 1, "replay.copies", self.copies, "at least 1, or null")

    @property
    def selects_by_class(self) -> bool:
        return True

    def check(self, batch_size: int, traits: Traits) -> None:
        super().check(batch_size, traits)
        if self.selection == "kmeans":
            need_package("sklearn", "sklearn", f"replay={self.name} with replay.selection=kmeans")

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        if not self.memory:
            return super().plan(index, stage)
        new, old = self.new_rows(index), self.memory_rows()
        return self._shuffled(new, index, stage, extra=np.tile(old, self._copies(len(new), old)))

    def _copies(self, new: int, old: Rows) -> int:
        if self.copies is not None:
            return self.copies
        if self.limit is None:
            return max(1, min(self.max_copies, round(new / len(old))))
        full = -(-4 * self.per_class // 5) * len(np.unique(self.pool.labels[old]))
        memory = len(old) if self.count_actual_size else full
        return copies_for_equal_compute(new, memory, self.limit, self.batch_size, self.max_copies)

    def validation(self, index: int) -> ValidationRows:
        """The validation split of the new task, and the validation examples of the memory."""
        rows: ValidationRows = [(self.val_pool, self.val_pool.rows_of(index))]
        if self.val_memory:
            rows.append((self.pool, np.concatenate([self.val_memory[task] for task in sorted(self.val_memory)])))
        return rows

    def setup(self, data: Encoded, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.val_memory: dict[int, Rows] = {}  # {task: stored rows for validation}
        # Whether `_copies` counts the memory as it is; else as ceil(0.8 m) examples of every class, as ConPET does.
        self.count_actual_size = False

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rng = self.rng(index)
        rows = self.pool.rows_of(index)
        train_rows, val_rows = [], []
        for label in np.unique(self.pool.labels[rows]):
            class_rows = rows[self.pool.labels[rows] == label]
            selected = select_per_class(
                self.pool, class_rows, self.per_class, self.selection, features, self.cluster_seed, rng
            )
            train, val = split_train_val(selected, self.train_share, rng)
            train_rows.append(train)
            val_rows.append(val)
        self.memory[index] = np.sort(np.concatenate(train_rows))
        self.val_memory[index] = np.sort(np.concatenate(val_rows))

    def stored_rows(self) -> Rows:
        return np.concatenate([super().stored_rows(), *self.val_memory.values()])

    def state(self) -> ReplayState:
        return {**super().state(), "spare": {str(task): rows.tolist() for task, rows in self.val_memory.items()}}

    def load(self, state: ReplayState) -> None:
        super().load(state)
        self.val_memory = {int(task): np.array(rows, dtype=np.int64) for task, rows in state["spare"].items()}


@dataclass
class ShareReplay(NoReplay):
    """A share of every task, stratified by label, mixed into the new data once per epoch (MixReplay)."""

    name: str = "share"
    share: float = 0.02

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "replay.share", self.share, "in [0, 1]")

    def plan(self, index: int, stage: str = "") -> BatchPlan:
        return self._shuffled(self.pool.rows_of(index), index, stage, extra=self.memory_rows() if self.memory else None)

    def update_memory(self, index: int, features: Callable[[Rows], np.ndarray]) -> None:
        rows = self.pool.rows_of(index)
        if self.share:
            self.memory[index] = stratified_sample(self.pool.labels, rows, self.share, self.rng(index))
