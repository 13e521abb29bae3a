"""The labelled rows of one table, divided into tasks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from clpet.config.schema import IntOrList, Scalar, require
from clpet.data.benchmark import SPLITS, Example
from clpet.data.label_folders import labelled_texts
from clpet.data.sources.base import Source
from clpet.data.splits import Splits, by_label, in_order, label_name, named_tasks, partition, split_off
from clpet.data.tabular_files import (
    Row,
    SplitRows,
    TableLayout,
    cell_text,
    check_encoding,
    column_names,
    is_empty,
    read_hub,
    read_local,
    row_text,
)
from clpet.errors import DataError
from clpet.escape import safe_name, short_repr


@dataclass
class Table(Source):
    """Labelled rows from the hub, from local parquet, jsonl, json, csv or tsv files, or a folder of texts per label.

    The tasks are defined by the first of these options that is set: `task` (a column with the name of the task),
    `task_labels` (task -> labels), `classes_per_task` (a number, or one per task; labels in order, or shuffled with
    `partition_seed`). `references` is a column with all correct answers.
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
    classes_per_task: IntOrList | None = None
    partition_seed: int | None = None
    drop_labels: list[str] = field(default_factory=list)
    where: dict[str, Scalar] | None = None
    test_share: float = 0.25
    encoding: str | None = None
    header: list[str] | None = None

    reads_single_file: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.classes_per_task
        counts = sizes if isinstance(sizes, list) else [1 if sizes is None else sizes]
        valid = all(type(count) is int and count >= 1 for count in counts)
        require(valid, "benchmark.classes_per_task", sizes, "at least 1, or a list of such numbers")
        require(0 < self.test_share < 1, "benchmark.test_share", self.test_share, "in (0, 1)")
        check_encoding(self.encoding)

    def check_objective(self) -> None:
        super().check_objective()
        for key in ("classes_per_task", "partition_seed", "task_labels") if self.answers else ():
            expected = f"null with objective={self.objective}, whose tasks come from benchmark.task"
            require(getattr(self, key) is None, f"benchmark.{key}", getattr(self, key), expected)

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        pairs = {split: self.examples(rows, split) for split, rows in self.rows(data_dir).items()}
        self.drop_bad()
        if self.task is not None:
            return self._by_column(pairs, self.task)
        splits = {split: [example for _, example in examples] for split, examples in pairs.items()}
        self._with_test(splits)
        if self.answers:
            return {self.name: splits}
        return by_label(splits, self.groups(in_order({str(example.target) for example in splits["train"]})))

    def rows(self, data_dir: Path | None) -> dict[str, SplitRows]:
        """The rows of every split, unchecked."""
        if data_dir is not None:
            root = self.data_root(data_dir)
            texts = labelled_texts(root, self.report)
            return texts or read_local(root, self.splits, self.report, TableLayout(self.encoding, self.header))
        if self.hub is None:
            raise DataError(f"benchmark {self.name} is read from local files: set data_dir=FOLDER")
        columns = self.hub_columns or {}
        return read_hub(self.hub, self.hub_config, self.hub_revision, self.splits, columns, self.report)

    def examples(self, rows: SplitRows, split: str) -> list[tuple[Row, Example]]:
        """The rows that are used, with their examples; bad and dropped rows are recorded in the report."""
        where = (self.where or {}).items() if split == "train" else ()
        rows.require(*self.columns(), *(column for column, _ in where))
        for number, error in rows.bad.items():
            self.report.add_bad_row(rows.origin, error, number)
        examples: list[tuple[Row, Example]] = []
        normalized: dict[str, int] = {}  # label as it is in the file -> first row
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
                    normalized.setdefault(row[self.label], number)
                row[self.label] = label
                examples.append((row, self._checked(row)))
            except DataError as bad:
                self.report.add_bad_row(rows.origin, str(bad), number)
                continue
            self._count_empty(row, rows.origin)
        if normalized:
            first, number = next(iter(normalized.items()))
            self.report.other_notes.append(
                f"{rows.origin}: {len(normalized)} labels lose surrounding spaces or change to Unicode form NFC, "
                f"the first is {short_repr(first)} in row {number}"
            )
        return examples

    def columns(self) -> list[str]:
        """The columns that the rows must have."""
        options = [self.text, self.label, *self.prompt_columns, *self.extra_columns, self.task, self.references]
        return [name for option in options if option for name in column_names(option)]

    def _label(self, row: Row) -> str:
        value = row[self.label]
        if is_empty(value):
            raise DataError("no label")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of integers with an empty cell is read as floats
        if not isinstance(value, str | int | bool):
            raise DataError(f"the label {short_repr(value)}, which is neither a name nor an integer")
        return label_name(value)

    def _checked(self, row: Row) -> Example:
        """The example of a row. Raises DataError with a noun phrase, as `add_bad_row` needs it."""
        if self.task and is_empty(row[self.task]):
            raise DataError("no task")
        example = self.example(row)
        if not example.text.strip():
            raise DataError("an empty text")
        return example

    def _count_empty(self, row: Row, origin: str) -> None:
        """Counts the empty cells in a text or prompt of several columns; they are read as an empty text."""
        for column in [*self.prompt_columns, *(column_names(self.text) if "{" in self.text else ())]:
            if is_empty(row.get(column, "")):
                self.report.empty[f"column {safe_name(column)} of {origin}"] += 1

    def example(self, row: Row) -> Example:
        """One row as an Example, with the other columns of the prompt as its fields."""
        for name in self.extra_columns:
            if is_empty(row[name]):
                raise DataError(f"an empty {safe_name(name)}")
        fields = {name: cell_text(row[name], name) for name in (*self.prompt_columns, *self.extra_columns)}
        answers = row[self.references] if self.references and self.answers else None
        references = tuple(map(label_name, [answers] if isinstance(answers, str) else answers or ()))
        return Example(row_text(self.text, row), str(row[self.label]), fields, references=references)

    def groups(self, labels: list[str]) -> dict[str, list[str]]:
        """{task: its labels}; `labels` are in the order of their ids."""
        if self.task_labels is not None:
            return {task: [label_name(label) for label in names] for task, names in self.task_labels.items()}
        sizes = self.classes_per_task or len(labels)
        if not isinstance(sizes, list):
            rest = len(labels) % sizes
            sizes = [sizes] * (len(labels) // sizes) + ([rest] if rest else [])
        return named_tasks(partition(labels, sizes, self.partition_seed))

    def _by_column(self, pairs: dict[str, list[tuple[Row, Example]]], column: str) -> dict[str, Splits]:
        tasks: dict[str, Splits] = {}
        for split, examples in pairs.items():
            for row, example in examples:
                tasks.setdefault(cell_text(row[column], column).strip(), {}).setdefault(split, []).append(example)
        for splits in tasks.values():
            self._with_test(splits)
        return tasks

    def _with_test(self, splits: Splits) -> None:
        """Cuts a test split from train if there is none."""
        if not splits.get("test"):
            train = splits.get("train", [])
            splits["train"], splits["test"] = split_off(train, self.test_share, self.labelled(train))
