"""New texts to predict, from a file or from stdin: the columns of the training data without the label."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpet.data.data_files import TABLES, read_bytes, suffix
from clpet.data.decoding import Decoded, decode_strictly
from clpet.data.read_report import ReadReport
from clpet.data.sources.base import Source
from clpet.data.tabular_files import Row, SplitRows, cell_text, is_empty, json_rows, read_table
from clpet.errors import DataError, first_line
from clpet.escape import safe_name

STDIN = "-"
SKIP_BAD = "--skip-bad"
KINDS = (*TABLES, ".txt")  # and those that COMPRESSED names, with .gz


@dataclass
class TextInput:
    """`rows` as in the file, and of each what the model reads: `texts`, with "text" and the slots, or with "messages".

    `tasks` are the names of their tasks, if these are known.
    """

    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    texts: list[dict[str, object]] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskNames:
    """Where the tasks of texts are named: one name for all, or a column. Neither: they are not known."""

    name: str | None = None
    column: str | None = None

    @property
    def are_named(self) -> bool:
        """Whether the tasks are named."""
        return bool(self.name or self.column)

    def of(self, row: Row) -> str | None:
        """The task of a row. Raises DataError with a noun phrase for an empty cell."""
        if self.column is None:
            return self.name
        if is_empty(row[self.column]):
            raise DataError("no task")
        return cell_text(row[self.column], self.column).strip()


UNKNOWN = TaskNames()


def read_texts(
    file: str, source: Source, names: TaskNames = UNKNOWN, skip_bad: bool = False, new: Sequence[str] = ()
) -> tuple[TextInput, ReadReport]:
    """The texts of a file, or of stdin if it is `-`, and what was repaired or dropped while they were read.

    `new` are the columns that will be added. Raises DataError for a missing column, and for rows without a text unless
    `skip_bad`.
    """
    report = ReadReport()
    rows = _read(file, report)
    rows.require(*source.input_columns(rows.columns, names.are_named), *([names.column] if names.column else []))
    columns = list(rows.values[0]) if rows.values else sorted(rows.columns)
    if taken := [name for name in new if name in columns]:
        raise DataError(f"{rows.origin} already has a column {taken[0]}, which predict adds: rename or remove it")
    result = TextInput(columns)
    for number, error in rows.bad.items():
        report.add_bad_row(rows.origin, error, number)
    for number, row in zip(rows.numbers, rows.values, strict=True):
        try:
            task = names.of(row)
            text = source.new_text(row, task)
        except DataError as bad:
            report.add_bad_row(rows.origin, str(bad), number)
            continue
        result.rows.append(row)
        result.texts.append(text)
        result.tasks += [task] if task is not None else []
        for slot in source.slots:
            report.empty[f"column {safe_name(slot)} of {rows.origin}"] += slot in row and is_empty(row[slot])
    report.drop("bad", report.drop_bad_rows(skip_bad, SKIP_BAD))
    return result, report


def _read(file: str, report: ReadReport) -> SplitRows:
    """The rows of a table, or one row per line of a text. Raises DataError."""
    if file == STDIN:
        decoded = decode_strictly(sys.stdin.buffer.read(), Path("stdin"))
        report.add_decoded("stdin", decoded)
        if decoded.text.lstrip()[:1] in ("{", "["):
            try:
                return json_rows(decoded.text, Path("stdin"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"stdin cannot be read as JSON: {first_line(error)[:200]}") from error
        return _lines(decoded, "stdin")
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"{file} is not a file; - reads texts from stdin")
    if suffix(path) not in KINDS:
        raise DataError(f"{file} ends in none of {', '.join(KINDS)}: give one of these, or its texts through stdin (-)")
    if suffix(path) != ".txt":
        return read_table(path, report)
    decoded = decode_strictly(read_bytes(path), path)
    report.add_decoded(path, decoded)
    return _lines(decoded, file)


def _lines(decoded: Decoded, origin: str) -> SplitRows:
    """One text per line. A line may contain any character but the line feed; the carriage return before it is cut."""
    lines = decoded.text.removesuffix("\n").split("\n") if decoded.text else []
    return SplitRows(origin, {"text"}, [{"text": line.removesuffix("\r")} for line in lines])
