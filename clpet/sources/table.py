"""Labelled rows of one table as tasks."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpet.config import require
from clpet.errors import DataError
from clpet.readers import Rows, fill, read_hub, read_local, slots
from clpet.sources.base import Source
from clpet.splits import Splits, by_label, has_labels, in_order, label_name, named_tasks, partition, split_off
from clpet.tasks import SPLITS, Example

log = logging.getLogger(__name__)


@dataclass
class Table(Source):
    """Labelled rows from the hub or from local parquet, jsonl or csv; tasks are groups of labels or a column.

    Tasks come from, in this order: `task` (a column), `task_labels` (task -> labels), `classes_per_task`
    (a number or one a task; labels in order, or shuffled by `partition_seed`). `references` names a column with
    all answers that count as right.
    """

    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_columns: dict[str, str] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    text: str = "text"
    label: str = "label"
    references: str | None = None
    task: str | None = None
    task_labels: dict[str, list[str]] | None = None
    classes_per_task: Any = None
    partition_seed: int | None = None
    drop_labels: list[str] = field(default_factory=list)
    where: dict[str, Any] | None = None
    test_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.classes_per_task
        counts = sizes if isinstance(sizes, list) else [1 if sizes is None else sizes]
        fits = all(type(count) is int and count >= 1 for count in counts)
        require(fits, "benchmark.classes_per_task", sizes, "at least 1, or a list of such numbers")
        for key in ("classes_per_task", "partition_seed", "task_labels") if self.answers else ():
            what = "null with objective=text_to_text, whose tasks come from benchmark.task"
            require(getattr(self, key) is None, f"benchmark.{key}", getattr(self, key), what)
        require(0 < self.test_share < 1, "benchmark.test_share", self.test_share, "in (0, 1)")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        rows = self.rows(data_dir)
        if self.task is not None:
            return self._by_column(rows, self.task)
        splits = {split: [self.example(row) for row in self._kept(part, split)] for split, part in rows.items()}
        self._with_test(splits)
        if self.answers:
            return {self.name: splits}
        return by_label(splits, self.groups(in_order({str(example.target) for example in splits["train"]})))

    def rows(self, data_dir: Path | None) -> dict[str, Rows]:
        """The rows of every split, before they are checked and made into examples."""
        if data_dir is not None:
            return read_local(self.place(data_dir), self.splits)
        if self.hub is None:
            raise DataError(f"benchmark {self.name} is read from local files: say data_dir=FOLDER")
        return read_hub(self.hub, self.hub_config, self.hub_revision, self.splits, self.hub_columns or {})

    def _kept(self, rows: Rows, split: str) -> Iterable[dict[str, Any]]:
        columns = [self.text, self.label, *self.prompt_columns, *(self.task, self.references)]
        rows.need(*(name for column in columns if column for name in slots(column)))
        where = (self.where or {}).items() if split == "train" else ()
        rows.need(*(column for column, _ in where))
        respelt: dict[str, int] = {}
        for number, row in enumerate(rows.values, 1):
            if any(str(row[column]).lower() != str(value).lower() for column, value in where):
                continue
            try:
                label, text = row[self.label], fill(self.text, row)
            except DataError as error:
                raise DataError(f"{rows.where}: row {number}: {error}") from None
            if isinstance(label, float) and label.is_integer():
                label = row[self.label] = int(label)  # a column of whole numbers with a hole is read as floats
            if isinstance(label, str) and label != label_name(label):
                respelt.setdefault(label, number)
                label = row[self.label] = label_name(label)
            if label is None or not isinstance(label, str | int | bool):
                raise DataError(f"{rows.where}: row {number} has the label {label!r}; a name or a number is needed")
            if not text.strip():
                raise DataError(f"{rows.where}: row {number} has an empty text")
            if str(label) not in self.drop_labels:
                yield row
        if respelt:
            log.warning(
                "%s: outer spaces are removed from %d labels, or their Unicode form becomes NFC: first %r in row %d",
                rows.where, len(respelt), *next(iter(respelt.items())),
            )  # fmt: skip

    def example(self, row: dict[str, Any]) -> Example:
        """One row as an Example; what the prompt needs beside the text becomes its fields."""
        fields = {name: str(row[name]) for name in self.prompt_columns}
        known = row[self.references] if self.references and self.answers else None
        references = tuple(map(label_name, [known] if isinstance(known, str) else known or ()))
        return Example(fill(self.text, row), str(row[self.label]), fields, references=references)

    def groups(self, labels: list[str]) -> dict[str, list[str]]:
        """{task: its labels} of labels in the order of their ids."""
        if self.task_labels is not None:
            return {task: [label_name(label) for label in own] for task, own in self.task_labels.items()}
        sizes = self.classes_per_task or len(labels)
        if not isinstance(sizes, list):
            rest = len(labels) % sizes
            sizes = [sizes] * (len(labels) // sizes) + ([rest] if rest else [])
        return named_tasks(partition(labels, sizes, self.partition_seed))

    def _by_column(self, rows: dict[str, Rows], column: str) -> dict[str, Splits]:
        tasks: dict[str, Splits] = {}
        for split, part in rows.items():
            for row in self._kept(part, split):
                tasks.setdefault(str(row[column]), {}).setdefault(split, []).append(self.example(row))
        for splits in tasks.values():
            self._with_test(splits)
        return tasks

    def _with_test(self, splits: Splits) -> None:
        """Cuts a test part from train where there is none."""
        if not splits.get("test"):
            train = splits.get("train", [])
            labelled = not self.answers or has_labels(train)
            splits["train"], splits["test"] = split_off(train, self.test_share, labelled)
