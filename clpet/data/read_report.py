"""What reading a benchmark's data skipped, repaired and dropped: said by every command, and part of a run's record."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from clpet.data.decoding import Decoded
from clpet.errors import DataError
from clpet.escape import inline

FEW = 5  # files, rows or complaints that a message names
MANY = 100  # names that a record holds


@dataclass
class ReadReport:
    """Filled by the readers of a benchmark while they read.

    `read` counts rows or documents by file and `dropped` those that did not become examples, by reason, so that
    what was read = what was dropped + the examples of all tasks.
    """

    unit: str = "rows"
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: dict[str, list[str]] = field(default_factory=dict)
    encodings: dict[str, str] = field(default_factory=dict)
    replaced: Counter[str] = field(default_factory=Counter)
    line_ends: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)
    complaints: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def skip(self, folder: object, names: Collection[str]) -> None:
        """Notes files and sub-folders that are not read."""
        if names:
            self.unread[str(folder)] = sorted({*self.unread.get(str(folder), []), *names})

    def decoded(self, file: object, found: Decoded) -> None:
        """Notes what became of the bytes of a file, or of a stretch of it."""
        if not found.codec.startswith("utf-8"):
            self.encodings[str(file)] = found.codec.upper()
        self.replaced[str(file)] += found.replaced
        self.line_ends[str(file)] += found.line_ends

    def complain(self, file: object, what: str, row: int) -> None:
        """Notes a row that cannot be used: it has `what`."""
        self.complaints.setdefault(str(file), {}).setdefault(what, []).append(row)

    def drop(self, reason: str, count: int) -> None:
        """Counts rows or documents that were read but not taken."""
        self.dropped[reason] += count

    def settle(self, skip_bad: bool) -> int:
        """How many rows were complained of and are dropped. Raises DataError, which names them, unless `skip_bad`."""
        found = [f"{file}: {_rows(wrong)}" for file, wrong in self.complaints.items()]
        count = sum(len(rows) for wrong in self.complaints.values() for rows in wrong.values())
        if found and not skip_bad:
            raise DataError(f"{_listed(found, '; ')} (benchmark.skip_bad=true drops such rows)")
        if found:
            self.others.append(f"{count} bad rows are dropped: {_listed(found, '; ')}")
        self.complaints = {}
        return count

    def notes(self) -> list[str]:
        """A line for everything that was skipped or repaired."""
        found = [f"not read in {folder}: {_listed(names)}" for folder, names in self.unread.items()]
        codecs = [f"{file} ({codec})" for file, codec in self.encodings.items()]
        found += [f"decoded by their byte order mark: {_listed(codecs)}"] if codecs else []
        for counts, text in (
            (self.replaced, "bytes that are not UTF-8 became U+FFFD"),
            (self.line_ends, "Windows line ends (CRLF) became line feeds"),
            (self.empty, "empty cells are read as an empty text"),
        ):
            files = [f"{file} ({count})" for file, count in counts.items() if count]
            found += [f"{counts.total()} {text}: {_listed(files)}"] if files else []
        return [inline(note) for note in found + self.others]

    def record(self, kept: int) -> dict[str, Any]:
        """The same for run.json, long lists shortened; the tasks hold `kept` rows or documents."""
        counts = {key: +getattr(self, key) for key in ("dropped", "replaced", "line_ends", "empty")}
        unread = {folder: {"count": len(names), "names": names[:MANY]} for folder, names in self.unread.items()}
        parts: dict[str, dict[str, Any]] = {"unread": unread, "encodings": self.encodings, **counts}
        return {
            "unit": self.unit,
            "read": self.read.total(),
            "kept": kept,
            **{key: dict(list(part.items())[:MANY]) for key, part in parts.items() if part},
            **({"notes": self.others[:MANY]} if self.others else {}),
        }


def account(record: dict[str, Any]) -> str:
    """A line in which what was read and what was dropped add up to what the tasks hold."""
    dropped = "".join(f" - {count} {reason}" for reason, count in record.get("dropped", {}).items())
    return f"{record['unit']}: {record['read']} read{dropped} = {record['kept']} in the tasks"


def _rows(wrong: dict[str, list[int]]) -> str:
    """Complaints about a file: `row 2 has an empty text; rows 5, 9 and 30 more have no label`."""
    found = []
    for what, rows in wrong.items():
        one = len(rows) == 1
        found.append(f"row{'' if one else 's'} {_listed(map(str, rows))} {'has' if one else 'have'} {what}")
    return _listed(found, "; ")


def _listed(items: Iterable[str], between: str = ", ") -> str:
    items = list(items)
    more = f" and {len(items) - FEW} more" if len(items) > FEW else ""
    return between.join(items[:FEW]) + more
