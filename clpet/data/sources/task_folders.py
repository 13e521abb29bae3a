"""A folder, or a data set of the hub, per task."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpet.config.schema import require
from clpet.data.benchmark import SPLITS
from clpet.data.data_files import note_unread, subfolders, tables
from clpet.data.sources.base import Source
from clpet.data.sources.table import Table
from clpet.data.splits import Splits, has_labels, split_off
from clpet.data.tabular_files import read_hub, read_local
from clpet.errors import DataError


@dataclass
class Folders(Source):
    """One folder per task with train, validation and test files; from the hub, one data set per task.

    `folders` are the tasks; without any, all sub-folders of data_dir that have data files, in the order of names.
    `label_space=task` keeps the labels of different tasks apart, `union` lets equal names be one label;
    `label_sets` names tasks that share their labels (task -> set). `instructions` (task -> text) fill the
    prompt's {instruction} where the rows have no such column. `words` (task -> label -> word) are what is answered
    for a label. `references` names a column with all answers that count as right. `test_share` is cut from train
    where there is no test part.
    """

    folders: list[str] = field(default_factory=list)
    text: str = "text"
    label: str = "label"
    references: str | None = None
    label_space: str = "task"
    label_sets: dict[str, str] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    hub_tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    test_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.test_share
        require(share is None or 0 < share < 1, "benchmark.test_share", share, "in (0, 1), or null")
        require(self.label_space in ("task", "union"), "benchmark.label_space", self.label_space, "task or union")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        there = self._discovered(data_dir)
        wanted = [str(name) for name in self.tasks or self.named_order() or there if name in there]
        found = {name: self._read_task(name, data_dir) for name in wanted or there}
        self.drop_bad()
        for splits in found.values():
            if self.test_share and not splits.get("test"):
                labelled = not self.answers or has_labels(splits["train"])
                splits["train"], splits["test"] = split_off(splits["train"], self.test_share, labelled)
        return found

    def _discovered(self, data_dir: Path | None) -> list[str]:
        """The task names; where none are given, all sub-folders of data_dir that have a data file."""
        if data_dir is None:
            if not self.folders:
                raise DataError(f"benchmark {self.name} is read from local files: say data_dir=FOLDER")
            return self.folders
        place = self.place(data_dir)
        there = subfolders(place)
        names = self.folders or [name for name, path in there.items() if tables(path)]
        if not names:
            raise DataError(f"{place} has no folders with data files: one for each task, as a/train.csv, is expected")
        note_unread(place, [there[name] for name in names if name in there], self.report)
        return names

    def _read_task(self, name: str, data_dir: Path | None) -> Splits:
        kept: dict[str, Any] = {"objective": self.objective, "prompt": self.prompt}
        table = Table(
            name=name, text=self.text, label=self.label, splits=self.splits, references=self.references, **kept
        )
        if data_dir is not None:
            rows = read_local(self._folder(name, data_dir), table.splits, self.report)
        else:
            if name not in self.hub_tasks:
                raise DataError(
                    f"task {name} of {self.name} has no data set on the hub that gives its published texts "
                    "(benchmark.hub_tasks): say data_dir=FOLDER"
                )
            spec = dict(self.hub_tasks[name])
            table = Table(name=name, **{**kept, **spec})
            rows = read_hub(str(table.hub), table.hub_config, table.hub_revision, table.splits, {}, self.report)
        table.report = self.report
        label = self._labeller(name)
        splits = {}
        for split, part in rows.items():
            if "instruction" in table.prompt_columns and "instruction" not in part.columns:
                part.fill("instruction", self.instructions.get(name, ""))
            found = [example for _, example in table.examples(part, split)]
            splits[split] = [dataclasses.replace(example, target=label(str(example.target))) for example in found]
        return splits

    def _folder(self, name: str, data_dir: Path) -> Path:
        place = self.place(data_dir)
        return subfolders(place).get(name, place / name)

    def _labeller(self, task: str) -> Callable[[Any], str]:
        prefix = "" if self.answers or self.label_space == "union" else f"{(self.label_sets or {}).get(task, task)}: "
        words = self.words.get(task, {})
        return lambda value: prefix + words.get(str(value), str(value))
