"""Looks at a file or folder of data: how its files are arranged, their rows, and what is wrong with them.

Unlike the sources, which stop at the first problem of a file, it reads on and collects the problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from clpet.data.column_summary import column_summaries
from clpet.data.csv_files import first_rows, missing_header, recognised_separator
from clpet.data.data_files import (
    TABLES,
    TEXTS,
    domain_files,
    missing_file,
    read_bytes,
    split_of,
    stem,
    subfolders,
    suffix,
    tables,
)
from clpet.data.decoding import decode_strictly, encoding, has_many_zeros, invalid_lines, likely_codec
from clpet.data.guess import Kind, Reading, readings, unnamed_task_candidates
from clpet.data.label_folders import label_folders, labelled_texts
from clpet.data.read_report import ReadReport, listed
from clpet.data.tabular_files import SAMPLE, SplitRows, TableLayout, read_table
from clpet.errors import DataError

Files = dict[str, dict[str, Path]]  # task, or "" for one table -> split -> file


class Layout(Enum):
    """How the files are arranged."""

    table = "one table"
    task_tables = "tables of several tasks"
    label_folders = "a folder of texts for each label"
    texts = "plain text"


@dataclass
class Survey:
    """What is at a path. `rows` has the readable rows by task ("" for one table) and split."""

    path: Path
    layout: Layout
    rows: dict[str, dict[str, SplitRows]] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)  # of the benchmark, without which it cannot be read
    problems: list[str] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)

    def tables(self) -> list[SplitRows]:
        """The rows of all tasks and splits."""
        return [rows for splits in self.rows.values() for rows in splits.values()]


def survey(path: Path, layout: TableLayout) -> Survey:
    """What is at a path; `layout` has what is already known of its tables. Raises DataError if nothing can be read."""
    if not path.exists():
        raise DataError(missing_file(path))
    if label_folders(path):
        result = Survey(path, Layout.label_folders)
        result.rows = {"": labelled_texts(path, result.report)}
        _note_bad_rows(result.tables(), result.report)
        return result
    result = Survey(path, Layout.table)
    files = _table_files(path, result)
    if not files:
        if not (suffix(path) in TEXTS if path.is_file() else domain_files(path, result.report)):
            raise DataError(f"{path} is not a table or a text: {', '.join(TABLES)}, .txt (or these with .gz) are read")
        return Survey(path, Layout.texts)
    result.layout = Layout.table if "" in files else Layout.task_tables
    read = _reader(result, layout)
    result.rows = {task: {split: read(file) for split, file in splits.items()} for task, splits in files.items()}
    return result


def _table_files(path: Path, result: Survey) -> Files:
    """The tables of a file or folder; empty if it has none."""
    if path.is_file():
        return {"": {"train": path}} if suffix(path) in TABLES else {}
    if not (candidates := tables(path)):
        folders = {name: folder for name, folder in subfolders(path).items() if tables(folder)}
        return {name: _splits(tables(folder), folder, result) for name, folder in folders.items()}
    if len(candidates) > 1 and not any(split_of(stem(file)) for file in candidates):
        return {stem(file): {"train": file} for file in candidates}
    return {"": _splits(candidates, path, result)}


def _splits(files: Sequence[Path], folder: Path, result: Survey) -> dict[str, Path]:
    """{split: its file} of one task. Raises DataError if it is not clear which file is train."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(stem(file)) or "", []).append(file)
    others = by_split.pop("", [])
    if not by_split and len(others) == 1:
        return {"train": others[0]}
    if "train" not in by_split:
        raise DataError(
            f"{folder} has no train file, only {listed(file.name for file in files)}: rename one of them, or look at "
            "one file alone"
        )
    for split, several in by_split.items():
        if len(several) > 1:
            raise DataError(f"{folder} has {listed(file.name for file in several)} for {split}: join or remove them")
        if stem(several[0]) != split:
            result.options[f"benchmark.splits.{split}"] = stem(several[0])
    return {split: several[0] for split, several in by_split.items()}


def _reader(result: Survey, layout: TableLayout) -> Callable[[Path], SplitRows]:
    """The function that reads a table and notes what it needs for this, and its unreadable rows."""

    def read(file: Path) -> SplitRows:
        is_text = suffix(file) != ".parquet"
        needed = _with_header(file, _with_encoding(file, layout, result), result) if is_text else layout
        rows = read_table(file, result.report, needed)
        _note_bad_rows([rows], result.report)
        if not rows.values:
            result.problems.append(f"{file} has no rows")
        return rows

    return read


def _note_bad_rows(tables: Sequence[SplitRows], report: ReadReport) -> None:
    for rows in tables:
        for number, error in rows.bad.items():
            report.add_bad_row(rows.origin, error, number)


def _with_encoding(file: Path, layout: TableLayout, result: Survey) -> TableLayout:
    data = read_bytes(file)
    if layout.encoding is not None or encoding(data) != "utf-8":
        return layout
    zeros, lines = has_many_zeros(data), invalid_lines(data)
    if not zeros and not lines:
        return layout
    codec = likely_codec(data)
    result.options["benchmark.encoding"] = codec
    where = "many bytes are zero" if zeros else f"invalid bytes in {len(lines)} lines, {listed(map(str, lines))}"
    result.problems.append(f"{file} is not UTF-8: {where}; it is read as {codec}, so look at its accents")
    return layout._replace(encoding=codec)


def _with_header(file: Path, layout: TableLayout, result: Survey) -> TableLayout:
    """The layout with names of columns for a csv or tsv file without a header row."""
    if suffix(file) not in (".csv", ".tsv") or layout.header:
        return layout
    text = decode_strictly(read_bytes(file), file, layout.encoding).text
    separator = recognised_separator(text, "\t" if suffix(file) == ".tsv" else ",")
    rows = first_rows(text, separator, SAMPLE)
    if not missing_header(rows):
        return layout
    header = _names(rows)
    result.options["benchmark.header"] = header
    result.problems.append(
        f"{file} has no header row: its columns are called {', '.join(header)} by their values "
        "(benchmark.header=[...] names them otherwise)"
    )
    return layout._replace(header=header)


def _names(rows: Sequence[Sequence[str]]) -> list[str]:
    """text, label and task for the columns that look like these, column1, column2, ... for others.

    Of two columns of names the one with more values is the label, the other one the task.
    """
    names = [f"column{number}" for number in range(1, len(rows[0]) + 1)]
    values = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    columns = column_summaries([SplitRows("", set(names), values)])
    best = next(iter(readings(columns)), None)
    if best is None or best.kind is not Kind.labels:
        return names
    roles = {best.text: "text", best.label: "label"}
    of_names = unnamed_task_candidates(columns, Reading(Kind.texts, best.text))
    if len(of_names) == 2:
        label, task = sorted(of_names, key=lambda column: -column.distinct)
        roles = {best.text: "text", label.name: "label", task.name: "task"}
    return [roles.get(name, name) for name in names]
