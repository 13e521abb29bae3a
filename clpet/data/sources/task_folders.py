"""One folder, or one data set on the hub, per task."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpet.config.schema import Scalar, require
from clpet.data.benchmark import SPLITS
from clpet.data.data_files import note_unread, subfolders, task_tables
from clpet.data.sources.base import Source
from clpet.data.sources.table import Table
from clpet.data.splits import Splits, split_off
from clpet.data.tabular_files import TableLayout, check_encoding, read_hub, read_local
from clpet.errors import DataError


@dataclass
class Folders(Source):
    """One folder per task with train, validation and test files, or one file; from the hub, one data set per task.

    - `folders`: the tasks; by default all sub-folders of data_dir with tables or, if there are none, all its tables
      that are not named after splits, sorted by name.
    - `label_space`: with `task`, equal labels of different tasks are distinct; with `union` they are one label.
    - `label_sets` (task -> set): tasks of the same set share their labels.
    - `instructions` (task -> text): the prompt's {instruction}, for rows without such a column.
    - `words` (task -> label -> word): the answer for each label.
    - `references`: a column with all correct answers.
    - `test_share`: cut from train for tasks without a test split.
    """

    folders: list[str] = field(default_factory=list)
    text: str = "text"
    label: str = "label"
    references: str | None = None
    label_space: str = "task"
    label_sets: dict[str, str] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    hub_tasks: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    test_share: float | None = None
    encoding: str | None = None
    header: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.test_share
        require(share is None or 0 < share < 1, "benchmark.test_share", share, "in (0, 1), or null")
        check_encoding(self.encoding)
        require(self.label_space in ("task", "union"), "benchmark.label_space", self.label_space, "task or union")

    @property
    def task_slots(self) -> dict[str, dict[str, str]]:  # type: ignore[override]  # the base has none
        return {"instruction": self.instructions}

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        available = self._discover(data_dir)
        chosen = [str(name) for name in self.tasks or self.named_order() or available if name in available]
        # Without a match, all are read: the error about an unknown task follows in `load`.
        tasks = {name: self._read_task(name, data_dir) for name in chosen or available}
        self.drop_bad()
        for splits in tasks.values():
            if self.test_share and not splits.get("test"):
                train = splits["train"]
                splits["train"], splits["test"] = split_off(train, self.test_share, self.labelled(train))
        return tasks

    def _discover(self, data_dir: Path | None) -> list[str]:
        """The names of the tasks, by default those of all sub-folders of data_dir with tables, else of all tables."""
        if data_dir is None:
            if not self.folders:
                raise DataError(f"benchmark {self.name} is read from local files: set data_dir=FOLDER")
            return self.folders
        root = self.data_root(data_dir)
        by_default = task_tables(root)
        available, names = {**by_default, **subfolders(root)}, self.folders or list(by_default)
        if not names:
            raise DataError(f"{root} has no folders with data files: one per task, such as a/train.csv, is expected")
        note_unread(root, [available[name] for name in names if name in available], self.report)
        return names

    def _read_task(self, name: str, data_dir: Path | None) -> Splits:
        common: dict[str, Any] = {"name": name, "prompt": self.prompt}
        table = Table(text=self.text, label=self.label, splits=self.splits, references=self.references, **common)
        if data_dir is not None:
            layout = TableLayout(self.encoding, self.header)
            rows = read_local(self._path(name, data_dir), table.splits, self.report, layout)
        else:
            if name not in self.hub_tasks:
                raise DataError(
                    f"task {name} of {self.name} has no data set on the hub with its published texts "
                    "(benchmark.hub_tasks): set data_dir=FOLDER"
                )
            spec = dict(self.hub_tasks[name])
            table = Table(**{**common, **spec})
            rows = read_hub(str(table.hub), table.hub_config, table.hub_revision, table.splits, {}, self.report)
        table = table.reading_for(self.objective, self.traits, self.extra_columns)
        table.report = self.report
        label = self._labeller(name)
        splits = {}
        for split, split_rows in rows.items():
            if "instruction" in table.prompt_columns and "instruction" not in split_rows.columns:
                split_rows.add_column("instruction", self.instructions.get(name, ""))
            examples = [example for _, example in table.examples(split_rows, split)]
            splits[split] = [dataclasses.replace(example, target=label(str(example.target))) for example in examples]
        return splits

    def _path(self, name: str, data_dir: Path) -> Path:
        root = self.data_root(data_dir)
        return {**task_tables(root), **subfolders(root)}.get(name, root / name)

    def _labeller(self, task: str) -> Callable[[object], str]:
        """The function from a label in the rows of a task to its label in the benchmark."""
        prefix = "" if self.answers or self.label_space == "union" else f"{(self.label_sets or {}).get(task, task)}: "
        words = self.words.get(task, {})
        return lambda value: prefix + words.get(str(value), str(value))
