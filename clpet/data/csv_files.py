"""Tables as text: rows of cells between separators. The separator is recognised where the header needs another one."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clpet.data.data_files import suffix
from clpet.data.read_report import ReadReport
from clpet.errors import DataError
from clpet.escape import safe_name, short_repr

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.csv

LARGEST_BLOCK = 2**31 - 2  # bytes, the maximum block size of pyarrow's csv reader
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SAMPLE = 50  # rows by which a separator is recognised
REGULAR = 0.8  # share of these rows that must have as many cells as the header

Cells = dict[str, str | None]


class CsvTable(NamedTuple):
    """The cells of a file as texts, None for an empty one, with the rows that have another number of cells."""

    columns: list[str]
    values: list[Cells]
    numbers: list[int]  # of the rows, from 1
    bad: dict[int, str]  # row number -> error


def read_csv(text: str, path: Path, report: ReadReport, header: Sequence[str] | None = None) -> CsvTable:
    """The rows of a csv or tsv file, read as one block so that cells can have any length.

    Cells are texts: 1 and 01 are two labels. `header` has the names of the columns of a file without a header row.
    Raises DataError for a repeated column, and errors of pyarrow and of the module csv.
    """
    import pyarrow.csv

    text, separator = _separated(text, path, report)
    names = list(header or first_rows(text, separator, 1)[0])
    check_columns([name.strip() for name in names], path)
    data, bad = text.encode(), {}

    def invalid(row: "pyarrow.csv.InvalidRow") -> str:
        lines = row.text.count("\n")
        across = f" (a quote that is not closed? it spans {lines + 1} lines)" if lines else ""
        bad[row.number - (not header)] = f"{row.actual_columns} cells instead of {row.expected_columns}{across}"
        return "skip"

    block = pyarrow.csv.ReadOptions(
        block_size=min(len(data) + 1, LARGEST_BLOCK), use_threads=False, column_names=list(header) if header else None
    )
    options = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=invalid)
    as_text = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=True, null_values=[""]
    )
    table = pyarrow.csv.read_csv(pyarrow.BufferReader(data), block, options, as_text)
    if table.column_names != names:
        raise ValueError(f"its header is read as {short_repr(table.column_names)} and as {short_repr(names)}")
    if padded := [name for name in names if name != name.strip()]:
        report.other_notes.append(f"spaces are removed from the column names {short_repr(padded)} of {path}")
        table = table.rename_columns([name.strip() for name in names])
    values: list[Cells] = table.to_pylist()
    _note_swallowed_rows(values, separator, path, report)
    numbers = [number for number in range(1, len(values) + len(bad) + 1) if number not in bad]
    return CsvTable(table.column_names, values, numbers, bad)


def _separated(text: str, path: Path, report: ReadReport) -> tuple[str, str]:
    """(text, its separator); a first line `sep=;`, which spreadsheets write, is removed."""
    usual = "\t" if suffix(path) == ".tsv" else ","
    first, _, rest = text.partition("\n")
    if first.startswith("sep=") and first.strip()[4:] in SEPARATORS:
        text, separator = rest, first.strip()[4:]
    else:
        separator = recognised_separator(text, usual)
    if separator != usual:
        report.other_notes.append(f"the cells of {path} are separated by {SEPARATORS[separator]}")
    return text, separator


def recognised_separator(text: str, usual: str) -> str:
    """`usual`, unless it does not divide the header and another separator divides header and rows alike."""
    if len(first_rows(text, usual, 1)[0]) > 1:
        return usual
    widths: dict[str, int] = {}
    for separator in SEPARATORS:
        rows = first_rows(text, separator, SAMPLE)
        width = len(rows[0])
        if width > 1 and sum(len(row) == width for row in rows) >= REGULAR * len(rows):
            widths[separator] = width
    return max(widths, key=lambda separator: widths[separator], default=usual)


def first_rows(text: str, separator: str, count: int) -> list[list[str]]:
    """At most `count` rows that are not blank, at least one (which is empty in an empty file).

    Not read with pyarrow: the thread of its reader can abort the process at exit.
    """
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
            if row:
                rows.append(row)
            if len(rows) == count:
                break
    except csv.Error:  # a cell longer than the limit of the module
        if not rows:
            raise
    return rows or [[]]


def missing_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row is a row of values: one of its cells occurs again in its column, among few values."""
    first, *others = rows or [[]]
    for column, cell in enumerate(first):
        counts = Counter(row[column] for row in others if len(row) > column)
        if counts.get(cell, 0) > 0 and 2 * len(counts) <= counts.total() and cell.strip():
            return True
    return False


def _note_swallowed_rows(values: list[Cells], separator: str, path: Path, report: ReadReport) -> None:
    """Reports long cells whose lines look like rows: an unpaired quote opens a cell that ends at the next quote."""
    for number, row in enumerate(values, 1):
        for column, value in row.items():
            if value is None or value.count("\n") < 3:
                continue
            lines = value.splitlines()
            alike = sum(line.count(separator) == len(row) - 1 for line in lines)
            if len(row) > 1 and 2 * alike > len(lines):
                report.other_notes.append(
                    f"{path}: column {safe_name(column)} of row {number} spans {len(lines)} lines, of which {alike} "
                    "look like rows: check for a missing or an extra quote"
                )


def check_columns(names: Sequence[str], path: Path) -> None:
    """Raises DataError for two columns of one name."""
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise DataError(f"{path} has the column {safe_name(repeated[0])} twice")
