"""A report of the rows and files that were skipped, repaired or dropped while the data was read.

Every command prints it, and a run stores it in run.json and results.json.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from clpet.data.decoding import Decoded
from clpet.errors import DataError
from clpet.escape import inline
from clpet.records import ReadRecord, UnreadFiles

T = TypeVar("T")
FEW = 5  # names in a message
MANY = 100  # names in a record
MARKED = ("UTF-16", "UTF-32")  # encodings that are recognised by a byte order mark


@dataclass
class ReadReport:
    """Filled by the readers of a benchmark while they read.

    `read` counts rows or documents by file, `dropped` those that did not become examples by reason. Nothing is lost
    silently: read = dropped + the examples of all tasks.
    """

    unit: str = "rows"
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: dict[str, list[str]] = field(default_factory=dict)  # folder -> names of files in it
    encodings: dict[str, str] = field(default_factory=dict)  # file -> encoding, if it is not UTF-8
    replaced: Counter[str] = field(default_factory=Counter)  # file -> bytes
    line_ends: Counter[str] = field(default_factory=Counter)  # file -> CRLF line ends
    empty: Counter[str] = field(default_factory=Counter)  # column -> empty cells
    other_notes: list[str] = field(default_factory=list)
    bad_rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # file -> error -> row numbers

    def skip(self, folder: object, names: Collection[str]) -> None:
        """Records files and sub-folders that are not read."""
        if names:
            self.unread[str(folder)] = sorted({*self.unread.get(str(folder), []), *names})

    def add_decoded(self, file: object, decoded: Decoded) -> None:
        """Records the encoding and the repairs of a file, or of a stretch of it."""
        if not decoded.codec.startswith("utf-8"):
            self.encodings[str(file)] = decoded.codec.upper()
        self.replaced[str(file)] += decoded.replaced
        self.line_ends[str(file)] += decoded.line_ends

    def add_bad_row(self, file: object, error: str, row: int) -> None:
        """Records a row that cannot be used. `error` is a noun phrase: the row has `error`."""
        self.bad_rows.setdefault(str(file), {}).setdefault(error, []).append(row)

    def drop(self, reason: str, count: int) -> None:
        """Counts rows or documents that were read but are not used."""
        self.dropped[reason] += count

    def bad_row_lines(self) -> list[str]:
        """The bad rows, one line for each file."""
        return [f"{file}: {_rows(errors)}" for file, errors in self.bad_rows.items()]

    def drop_bad_rows(self, skip_bad: bool, option: str = "benchmark.skip_bad=true") -> int:
        """The number of bad rows, which are dropped. Raises DataError, which lists them, unless `skip_bad`.

        `option` is what the user sets for that.
        """
        lines = self.bad_row_lines()
        count = sum(len(rows) for errors in self.bad_rows.values() for rows in errors.values())
        if lines and not skip_bad:
            raise DataError(f"{listed(lines, '; ')} ({option} drops such rows)")
        if lines:
            self.other_notes.append(f"{count} bad rows are dropped: {listed(lines, '; ')}")
        self.bad_rows = {}
        return count

    def notes(self) -> list[str]:
        """One line for each kind of thing that was skipped or repaired."""
        lines = [f"not read in {folder}: {listed(names)}" for folder, names in self.unread.items()]
        for marked, source in ((True, "by their byte order mark"), (False, "with benchmark.encoding")):
            codecs = [f"{file} ({name})" for file, name in self.encodings.items() if (name in MARKED) == marked]
            lines += [f"decoded {source}: {listed(codecs)}"] if codecs else []
        for counts, text in (
            (self.replaced, "invalid UTF-8 bytes were replaced by U+FFFD"),
            (self.line_ends, "Windows line ends (CRLF) were replaced by line feeds"),
            (self.empty, "empty cells are read as an empty text"),
        ):
            files = [f"{file} ({count})" for file, count in counts.items() if count]
            lines += [f"{counts.total()} {text}: {listed(files)}"] if files else []
        return [inline(note) for note in lines + self.other_notes]

    def record(self, num_used: int) -> ReadRecord:
        """The report as plain values, long lists shortened; `num_used` rows or documents are in the tasks."""
        unread: dict[str, UnreadFiles] = {
            folder: {"count": len(names), "names": names[:MANY]} for folder, names in self.unread.items()
        }
        record: ReadRecord = {"unit": self.unit, "read": self.read.total(), "kept": num_used}
        if unread:
            record["unread"] = _first(unread)
        if self.encodings:
            record["encodings"] = _first(self.encodings)
        if +self.dropped:
            record["dropped"] = _first(+self.dropped)
        if +self.replaced:
            record["replaced"] = _first(+self.replaced)
        if +self.line_ends:
            record["line_ends"] = _first(+self.line_ends)
        if +self.empty:
            record["empty"] = _first(+self.empty)
        if self.other_notes:
            record["notes"] = self.other_notes[:MANY]
        return record


def _first(values: Mapping[str, T]) -> dict[str, T]:
    return dict(list(values.items())[:MANY])


def account(record: ReadRecord) -> str:
    """One line with the balance of a record: read - dropped = in the tasks."""
    dropped = "".join(f" - {count} {reason}" for reason, count in record.get("dropped", {}).items())
    return f"{record['unit']}: {record['read']} read{dropped} = {record['kept']} in the tasks"


def _rows(errors: dict[str, list[int]]) -> str:
    """The bad rows of a file: `row 2 has an empty text; rows 5, 9 and 30 more have no label`."""
    clauses = []
    for error, rows in errors.items():
        one = len(rows) == 1
        clauses.append(f"row{'' if one else 's'} {listed(map(str, rows))} {'has' if one else 'have'} {error}")
    return listed(clauses, "; ")


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first few items, and the number of the others."""
    items = list(items)
    more = f" and {len(items) - FEW} more" if len(items) > FEW else ""
    return separator.join(items[:FEW]) + more
