"""Labelled rows of one table as tasks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpet.config.schema import require
from clpet.data.benchmark import SPLITS, Example
from clpet.data.sources.base import Source
from clpet.data.splits import Splits, by_label, has_labels, in_order, label_name, named_tasks, partition, split_off
from clpet.data.tabular_files import Rows, cell, fill, is_empty, read_hub, read_local, slots
from clpet.errors import DataError
from clpet.escape import safe_name, short_repr

Row = dict[str, Any]


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
        found = {split: self.examples(part, split) for split, part in self.rows(data_dir).items()}
        self.drop_bad()
        if self.task is not None:
            return self._by_column(found, self.task)
        splits = {split: [example for _, example in part] for split, part in found.items()}
        self._with_test(splits)
        if self.answers:
            return {self.name: splits}
        return by_label(splits, self.groups(in_order({str(example.target) for example in splits["train"]})))

    def rows(self, data_dir: Path | None) -> dict[str, Rows]:
        """The rows of every split, before they are checked and made into examples."""
        if data_dir is not None:
            return read_local(self.place(data_dir), self.splits, self.report)
        if self.hub is None:
            raise DataError(f"benchmark {self.name} is read from local files: say data_dir=FOLDER")
        columns = self.hub_columns or {}
        return read_hub(self.hub, self.hub_config, self.hub_revision, self.splits, columns, self.report)

    def examples(self, rows: Rows, split: str) -> list[tuple[Row, Example]]:
        """The rows that are used, with their examples; bad rows and what is left out are noted in the report."""
        where = (self.where or {}).items() if split == "train" else ()
        rows.need(*self.columns(), *(column for column, _ in where))
        for number, what in rows.bad.items():
            self.report.add_bad_row(rows.where, what, number)
        found: list[tuple[Row, Example]] = []
        respelt: dict[str, int] = {}
        for number, row in zip(rows.numbers, rows.values, strict=True):
            if any(str(row[column]).lower() != str(value).lower() for column, value in where):
                self.report.drop("benchmark.where", 1)
                continue
            try:
                label = self._label(row)
                if label in self.drop_labels:
                    self.report.drop("benchmark.drop_labels", 1)
                    continue
                if isinstance(row[self.label], str) and label != row[self.label]:
                    respelt.setdefault(row[self.label], number)
                row[self.label] = label
                found.append((row, self._checked(row)))
            except DataError as error:
                self.report.add_bad_row(rows.where, str(error), number)
                continue
            self._note_empty(row, rows.where)
        if respelt:
            first, number = next(iter(respelt.items()))
            self.report.other_notes.append(
                f"{rows.where}: outer spaces are removed from {len(respelt)} labels, or their Unicode form becomes "
                f"NFC: first {short_repr(first)} in row {number}"
            )
        return found

    def columns(self) -> list[str]:
        """Columns that the rows must have."""
        options = [self.text, self.label, *self.prompt_columns, self.task, self.references]
        return [name for option in options if option for name in slots(option)]

    def _label(self, row: Row) -> str:
        value = row[self.label]
        if is_empty(value):
            raise DataError("no label")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with a hole is read as floats
        if not isinstance(value, str | int | bool):
            raise DataError(f"the label {short_repr(value)}, which is neither a name nor a whole number")
        return label_name(value)

    def _checked(self, row: Row) -> Example:
        """The example of a row. Raises DataError, a noun phrase, for what the row has or lacks."""
        if self.task and is_empty(row[self.task]):
            raise DataError("no task")
        example = self.example(row)
        if not example.text.strip():
            raise DataError("an empty text")
        return example

    def _note_empty(self, row: Row, where: str) -> None:
        """Counts empty cells inside a text or prompt of several columns: they are read as an empty text."""
        for column in [*self.prompt_columns, *(slots(self.text) if "{" in self.text else ())]:
            if is_empty(row.get(column, "")):
                self.report.empty[f"column {safe_name(column)} of {where}"] += 1

    def example(self, row: Row) -> Example:
        """One row as an Example; what the prompt needs beside the text becomes its fields."""
        fields = {name: cell(row[name], name) for name in self.prompt_columns}
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

    def _by_column(self, found: dict[str, list[tuple[Row, Example]]], column: str) -> dict[str, Splits]:
        tasks: dict[str, Splits] = {}
        for split, part in found.items():
            for row, example in part:
                tasks.setdefault(cell(row[column], column).strip(), {}).setdefault(split, []).append(example)
        for splits in tasks.values():
            self._with_test(splits)
        return tasks

    def _with_test(self, splits: Splits) -> None:
        """Cuts a test part from train where there is none."""
        if not splits.get("test"):
            train = splits.get("train", [])
            labelled = not self.answers or has_labels(train)
            splits["train"], splits["test"] = split_off(train, self.test_share, labelled)
