"""Plain text in files: each reader walks its documents once and can go back to any of them.

A reader never holds more than one document and one batch of rows. `scan` yields every document with its place;
`read` gives the pieces of the document at a place again.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clpet.errors import DataError, suggest

PIECE = 2000  # bytes of a long text without document borders that are one piece, to the end of a line
STRETCH = 65536  # bytes of it that are read together, at most, and to the end of a line
LONGEST_LINE = 65536
BATCH = 256  # rows of a parquet file that are decoded at a time
LARGE = 16 << 20  # bytes above which a txt file is no document
SUFFIXES = (".parquet", ".jsonl", ".txt")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip


class Unit(NamedTuple):
    """One document: where it begins and how far it goes (rows or bytes), its pieces, its id where the file has ids."""

    place: int
    span: int
    pieces: list[str]
    name: str | None


class Reader(Protocol):
    """A source of documents. Without `borders` its units are consecutive stretches of one text."""

    borders: bool
    joiner: str  # stands between the pieces of a document

    def scan(self) -> Iterator[Unit]:
        """All documents in order."""

    def read(self, place: int, span: int) -> list[str]:
        """The pieces of the document that `scan` found there."""


class Strings:
    """Texts in memory, one document each."""

    borders, joiner = True, ""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)

    def scan(self) -> Iterator[Unit]:
        for place, text in enumerate(self.texts):
            yield Unit(place, 1, [text], None)

    def read(self, place: int, span: int) -> list[str]:
        return [self.texts[place]]


class WholeFiles:
    """One document per file."""

    borders, joiner = True, ""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def scan(self) -> Iterator[Unit]:
        for place in range(len(self.paths)):
            yield Unit(place, 1, self.read(place, 1), None)

    def read(self, place: int, span: int) -> list[str]:
        return [decoded(self.paths[place].read_bytes()).replace("\r\n", "\n")]


class LongText:
    """One long text without known document borders, in stretches that end with a line."""

    borders, joiner = False, ""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self) -> Iterator[Unit]:
        length = min(STRETCH, max(PIECE, self.path.stat().st_size // 1000))
        with self.path.open("rb") as file:
            place = 0
            while data := _stretch(file, length):
                yield Unit(place, len(data), _pieces(data), None)
                place += len(data)

    def read(self, place: int, span: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(place)
            return _pieces(file.read(span))


def _stretch(file: Any, length: int) -> bytes:
    """At least `length` bytes up to the end of a line; a very long line is cut between two characters."""
    data: bytes = file.read(length)
    if data and not data.endswith(b"\n"):
        data += file.readline(LONGEST_LINE)
    while not data.endswith(b"\n") and (ahead := file.peek(1)[:1]) and ahead[0] & 0xC0 == 0x80:
        data += file.read(1)
    return data


def _pieces(data: bytes) -> list[str]:
    """Lines together, of about PIECE bytes."""
    parts = [b""]
    for line in data.splitlines(keepends=True):
        if len(parts[-1]) >= PIECE:
            parts.append(b"")
        parts[-1] += line
    return [decoded(part) for part in parts]


class Rows:
    """Rows of a table; consecutive rows with the same id are the pieces of one document, in order."""

    borders, joiner = True, "\n\n"

    def __init__(self, path: Path, text: str, document: str) -> None:
        self.path, self.text, self.document = path, text, document

    def rows(self) -> Iterator[tuple[int, str, str | None]]:
        """(place, text, document id or None) of every row."""
        raise NotImplementedError

    def read(self, place: int, span: int) -> list[str]:
        """The texts of consecutive rows."""
        raise NotImplementedError

    def scan(self) -> Iterator[Unit]:
        unit: Unit | None = None
        for place, text, name in self.rows():
            if unit is not None and name is not None and name == unit.name:
                unit.pieces.append(text)
            else:
                if unit is not None:
                    yield unit._replace(span=len(unit.pieces))
                unit = Unit(place, 1, [text], name)
        if unit is not None:
            yield unit._replace(span=len(unit.pieces))

    def checked(self, value: Any, row: int) -> str:
        """The text of a row. Raises DataError where it is none."""
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.path}: row {row} holds {value!r} in column {self.text}; a text is needed")
        return value or ""


class ParquetRows(Rows):
    """A parquet file, read a batch at a time; going back starts at the row group."""

    _next, _last = 0, -1  # the row that comes next, and the row group it is in
    _ahead: Iterator[Any]

    def rows(self) -> Iterator[tuple[int, str, str | None]]:
        with self._open() as file:
            columns = [self.text, *([self.document] if self.document in file.schema_arrow.names else [])]
            place = 0
            for batch in file.iter_batches(BATCH, columns=columns):
                ids = batch.column(1).to_pylist() if len(columns) == 2 else [None] * len(batch)
                for value, name in zip(batch.column(0).to_pylist(), ids, strict=True):
                    yield place, self.checked(value, place), None if name is None else str(name)
                    place += 1

    def read(self, place: int, span: int) -> list[str]:
        group = bisect_right(self._ends, place)
        if place < self._next or group > self._last:
            self._next = self._ends[group - 1] if group else 0
            self._ahead = self._texts(group)
        for _ in range(place - self._next):
            next(self._ahead)
        found = [next(self._ahead) or "" for _ in range(span)]
        self._next = place + span
        self._last = bisect_right(self._ends, self._next)
        return found

    def _texts(self, group: int) -> Iterator[Any]:
        with self._open() as file:
            for batch in file.iter_batches(BATCH, row_groups=range(group, len(self._ends)), columns=[self.text]):
                yield from batch.column(0).to_pylist()

    @cached_property
    def _ends(self) -> list[int]:
        """Row behind the last of every row group."""
        with self._open() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return list(accumulate(sizes))

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        if self.text not in file.schema_arrow.names:
            raise DataError(f"{self.path} has no column {self.text}{suggest(self.text, file.schema_arrow.names)}")
        return file


class JsonLines(Rows):
    """A jsonl file; a place is a byte offset."""

    def rows(self) -> Iterator[tuple[int, str, str | None]]:
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                row = self.row(line, number)
                name = row.get(self.document)
                yield place, self.checked(row[self.text], number), None if name is None else str(name)
                place += len(line)

    def read(self, place: int, span: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(place)
            return [self.checked(self.row(file.readline(), 0)[self.text], 0) for _ in range(span)]

    def row(self, line: bytes, number: int) -> dict[str, Any]:
        """One line as a dict that has the text. Raises DataError."""
        try:
            row = json.loads(line) if line.strip() else {self.text: ""}
        except ValueError as error:
            raise DataError(f"{self.path}: line {number + 1} is no JSON: {error}") from error
        if not isinstance(row, dict) or self.text not in row:
            there = suggest(self.text, row) if isinstance(row, dict) else ""
            raise DataError(f"{self.path}: line {number + 1} has no {self.text}{there}")
        return row


def decoded(data: bytes) -> str:
    """UTF-8 text; bytes that are none become the replacement character."""
    return data.decode(errors="replace")


def text_files(folder: Path) -> list[Path]:
    """Files of plain text in a folder and below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def domain_files(folder: Path) -> dict[str, list[Path]]:
    """{domain: its files}, sorted: every sub-folder that has any, and every file."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        files = text_files(path) if path.is_dir() else [path] if path.suffix in SUFFIXES else []
        if files:
            found.setdefault(path.name if path.is_dir() else path.stem, []).extend(files)
    return found


def named_splits(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their name, or their folder's, begins with; all are train where none says so."""
    found: dict[str, list[Path]] = {}
    for path in files:
        for name in (path.stem, path.parent.name):
            split = SPLIT_NAMES.get(re.split(r"[-_.]", name)[0])
            if split:
                found.setdefault(split, []).append(path)
                break
    return found if "train" in found else {"train": files}


def readers(files: Sequence[Path], text: str, document: str) -> list[Reader]:
    """A reader per file, or one for all txt files that are documents."""
    tables = {".parquet": ParquetRows, ".jsonl": JsonLines}
    found: list[Reader] = [tables[path.suffix](path, text, document) for path in files if path.suffix in tables]
    texts = [path for path in files if path.suffix not in tables]
    if len(texts) == 1 or any(path.stat().st_size > LARGE for path in texts):
        return found + [LongText(path) for path in texts]
    return found + ([WholeFiles(texts)] if texts else [])
