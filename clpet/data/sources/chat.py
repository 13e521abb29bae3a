"""Conversations: a folder or a file per task, or one table with a column that names the task."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from clpet.config.schema import require
from clpet.data.benchmark import SPLITS, Example, Turns
from clpet.data.conversation import Message, checked, conversation, example_of, question
from clpet.data.data_files import note_unread, subfolders, tables
from clpet.data.sources.base import Source
from clpet.data.splits import Splits, split_off
from clpet.data.tabular_files import Row, SplitRows, cell_text, is_empty, read_local
from clpet.errors import DataError
from clpet.escape import safe_name


@dataclass
class Chat(Source):
    """Rows with `messages` (roles and contents, and perhaps `tools`), or with a prompt, an answer and perhaps `system`.

    The tasks are the sub-folders with tables; else the values of the column `task`, if there is one; else one task.
    """

    chat: Turns | None = Turns.all
    messages: str = "messages"
    tools: str = "tools"
    system: str = "system"
    text: str = "prompt"
    label: str = "answer"
    task: str | None = "task"
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    test_share: float = 0.25

    reads_single_file: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chat is not None, "benchmark.chat", "null", "all or last with conversations")
        require(0 < self.test_share < 1, "benchmark.test_share", self.test_share, "in (0, 1)")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        if data_dir is None:
            raise DataError(f"benchmark {self.name} is read from local files: set data_dir=FOLDER")
        tasks: dict[str, Splits] = {}
        for folder, by_split in self._tables(self.data_root(data_dir)).items():
            for split, rows in by_split.items():
                for task, example in self.examples(rows):
                    tasks.setdefault(folder or task, {}).setdefault(split, []).append(example)
        self.drop_bad()
        for splits in tasks.values():
            if not splits.get("test"):
                train = splits.get("train", [])
                splits["train"], splits["test"] = split_off(train, self.test_share, self.labelled(train))
        return tasks

    def _tables(self, root: Path) -> dict[str, dict[str, SplitRows]]:
        """{folder of a task, or "" for one table: {split: rows}}."""
        folders = {name: path for name, path in subfolders(root).items() if tables(path)} if root.is_dir() else {}
        if not folders or tables(root):
            return {"": read_local(root, self.splits, self.report)}
        note_unread(root, list(folders.values()), self.report)
        return {name: read_local(path, self.splits, self.report) for name, path in folders.items()}

    def examples(self, rows: SplitRows) -> Iterator[tuple[str, Example]]:
        """(task, example) of every usable row; bad rows are recorded. Raises DataError for missing columns."""
        if self.messages not in rows.columns:
            rows.require(self.text, self.label)
        for number, error in rows.bad.items():
            self.report.add_bad_row(rows.origin, error, number)
        for number, row in zip(rows.numbers, rows.values, strict=True):
            try:
                yield self._task_of(row), self.example(row, f"{rows.origin}, row {number}")
            except DataError as bad:
                self.report.add_bad_row(rows.origin, str(bad), number)

    def _task_of(self, row: Row) -> str:
        if self.task is None or self.task not in row:
            return self.name
        if is_empty(row[self.task]):
            raise DataError("no task")
        return cell_text(row[self.task], self.task).strip()

    def example(self, row: Row, origin: str = "") -> Example:
        """The example of one row. Raises DataError with a noun phrase, as `add_bad_row` needs it."""
        turns = self._turns(row, {"user": self.text, "assistant": self.label})
        return example_of(conversation(turns, row.get(self.tools)), origin)

    def input_columns(self, available: Collection[str], task_given: bool) -> list[str]:
        return [self.messages] if self.messages in available else super().input_columns(available, task_given)

    def new_text(self, row: Row, task: str | None) -> dict[str, object]:
        """The messages and tools of a new row, without the assistant turn that may end it."""
        turns, tools = self._turns(row, {"user": self.text if self.text in row else "text"}), row.get(self.tools)
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        question(turns, tools)
        return {"messages": turns, "tools": tools}

    def _turns(self, row: Row, columns: dict[str, str]) -> list[Message]:
        """The messages of a row: the system's, and those of its column or the texts of `columns` by role."""
        system = cell_text(row.get(self.system), self.system)
        turns: list[Message]
        if is_empty(row.get(self.messages)):
            turns = [{"role": role, "content": cell_text(row.get(name), name)} for role, name in columns.items()]
        else:
            turns = checked(row[self.messages])
        if system and turns and turns[0]["role"] == "system":
            raise DataError(f"a system message in {safe_name(self.messages)} and one in {safe_name(self.system)}")
        return [*([{"role": "system", "content": system}] if system else []), *turns]
