"""Summaries of a table's columns: types, distinct values and lengths, from which its meaning is guessed."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clpet.data.tabular_files import SplitRows, is_empty
from clpet.escape import safe_name, short_repr

MAX_DEPTH = 3  # levels of objects whose keys are shown as columns a.b.c
SHOWN = 4  # distinct values in a description

TEXT, INTEGER, NUMBER, BOOLEAN, MESSAGES = "text", "integer", "number", "boolean", "messages"


@dataclass(frozen=True)
class ColumnSummary:
    """What the cells of a column look like. Types and lengths are those of the cells that are not empty."""

    name: str
    rows: int
    empty: int
    types: Counter[str]
    values: Counter[str]  # cells as text, with their numbers of rows
    words: float  # mean number of words
    numeric: bool  # whether all are numbers, perhaps written as text

    @property
    def filled(self) -> int:
        """Number of cells that are not empty."""
        return self.rows - self.empty

    @property
    def distinct(self) -> int:
        """Number of distinct values."""
        return len(self.values)

    def describe(self) -> list[str]:
        """Cells of a table: name, types, empty cells, distinct values, mean words, the most frequent values."""
        types = ", ".join(name if len(self.types) == 1 else f"{name} ({n})" for name, n in self.types.most_common())
        if self.numeric and self.types[TEXT]:
            types += " (numbers)"
        shown = SHOWN if 2 * self.distinct <= self.filled else 1
        frequent = ", ".join(short_repr(value) for value, _ in self.values.most_common(shown))
        more = ", ..." if self.distinct > shown else ""
        return [
            safe_name(self.name),
            types or "-",
            str(self.empty),
            str(self.distinct),
            f"{self.words:.1f}",
            frequent + more,
        ]


def summarize(name: str, cells: Iterable[object]) -> ColumnSummary:
    """The summary of a column by its cells."""
    types: Counter[str] = Counter()
    values: Counter[str] = Counter()
    rows = empty = words = 0
    numeric = True
    for cell in cells:
        rows += 1
        if is_empty(cell):
            empty += 1
            continue
        text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
        types[type_name(cell)] += 1
        values[text.strip()] += 1
        words += len(text.split())
        numeric = numeric and _is_number(text)
    return ColumnSummary(name, rows, empty, types, values, words / max(1, rows - empty), numeric and rows > empty)


def type_name(cell: object) -> str:
    """The type of a cell in words."""
    if (
        isinstance(cell, list)
        and cell
        and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in cell)
    ):
        return MESSAGES
    names = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: TEXT, list: "list", dict: "object", bytes: "bytes"}
    if isinstance(cell, float) and cell.is_integer():
        return INTEGER  # a column of integers with an empty cell is read as floats
    return names.get(type(cell), type(cell).__name__)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def column_summaries(tables: Iterable[SplitRows]) -> list[ColumnSummary]:
    """The summary of every column over several tables, in their order; the keys of objects are columns of their own."""
    tables = list(tables)
    for rows in tables:
        _expand(rows)
    names = dict.fromkeys(name for rows in tables for name in _ordered(rows))
    summaries = [summarize(name, (row.get(name) for rows in tables for row in rows.values)) for name in names]
    return [summary for summary in summaries if set(summary.types) != {"object"}]


def _ordered(rows: SplitRows) -> list[str]:
    """The columns in the order of the file, where its rows have one."""
    first: dict[str, Any] = rows.values[0] if rows.values else {}
    return [*first, *sorted(rows.columns - first.keys())]


def _expand(rows: SplitRows) -> None:
    """Adds a column a.b for every key of the objects in a column."""
    for _ in range(MAX_DEPTH):
        inner = {
            f"{name}.{key}"
            for name in rows.columns
            for row in rows.values
            if isinstance(cell := row.get(name), dict)
            for key in cell
        }
        rows.require(*sorted(inner - rows.columns))
