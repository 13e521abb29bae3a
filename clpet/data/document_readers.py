"""Plain text in files: each reader walks its documents once and can go back to any of them.

A reader never holds more than one document and one batch of rows. `scan` yields every document with its place;
`read` gives the pieces of the document at a place again.
"""

from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BufferedReader, BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clpet.data.data_files import suffix
from clpet.data.decoding import decode, encoding, remedy
from clpet.data.read_report import ReadReport
from clpet.errors import DataError, suggest
from clpet.escape import safe_name
from clpet.runtime.json_lines import parse_line

PIECE = 2000  # bytes of a long text without document borders that are one piece, to the end of a line
STRETCH = 65536  # bytes of it that are read together, at most, and to the end of a line
LONGEST_LINE = 65536
BATCH = 256  # rows of a parquet file that are decoded at a time
LARGE = 16 << 20  # bytes above which a txt file is no document


class Unit(NamedTuple):
    """One document: where it begins and how far it goes (rows or bytes), its pieces, its id where the file has ids."""

    place: int
    span: int
    pieces: list[str]
    name: str | None


class Reader(Protocol):
    """A source of documents. Without `has_boundaries` its units are consecutive stretches of one text."""

    has_boundaries: bool
    joiner: str  # stands between the pieces of a document
    name: str  # what messages call it
    report: ReadReport

    def scan(self) -> Iterator[Unit]:
        """All documents in order."""

    def read(self, place: int, span: int) -> list[str]:
        """The pieces of the document that `scan` found there."""


class Strings:
    """Texts in memory, one document each."""

    has_boundaries, joiner, name = True, "", "texts in memory"

    def __init__(self, texts: Iterable[str], report: ReadReport | None = None) -> None:
        self.texts, self.report = list(texts), report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        for place, text in enumerate(self.texts):
            yield Unit(place, 1, [text], None)

    def read(self, place: int, span: int) -> list[str]:
        return [self.texts[place]]


class WholeFiles:
    """One document per file."""

    has_boundaries, joiner, name = True, "", "txt files"

    def __init__(self, paths: Sequence[Path], report: ReadReport | None = None) -> None:
        self.paths, self.report = paths, report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        for place, path in enumerate(self.paths):
            found = decode(path.read_bytes(), path)
            self.report.decoded(path, found)
            yield Unit(place, 1, [found.text], None)

    def read(self, place: int, span: int) -> list[str]:
        path = self.paths[place]
        return [decode(path.read_bytes(), path).text]


class LongText:
    """One long text without known document borders, in stretches that end with a line."""

    has_boundaries, joiner = False, ""

    def __init__(self, path: Path, report: ReadReport | None = None) -> None:
        self.path, self.name, self.report = path, str(path), report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        length = min(STRETCH, max(PIECE, self.path.stat().st_size // 1000))
        with self._open() as file:
            place = file.tell()
            while data := _stretch(file, length):
                yield Unit(place, len(data), self._pieces(data, self.report), None)
                place += len(data)

    def read(self, place: int, span: int) -> list[str]:
        with self._open() as file:
            file.seek(place)
            return self._pieces(file.read(span))

    def _open(self) -> Any:
        """The file as UTF-8, behind its byte order mark; one in another encoding is held in memory."""
        file = self.path.open("rb")
        codec = encoding(file.peek(4)[:4])
        if codec.startswith("utf-8"):
            file.seek(3 if codec == "utf-8-sig" else 0)
            return file
        file.close()
        raw: Any = BytesIO(self._converted)
        return BufferedReader(raw)

    @cached_property
    def _converted(self) -> bytes:
        if self.path.stat().st_size > LARGE:
            raise DataError(f"{self.path} is too large to be read as other than UTF-8: {remedy(self.path, 'UTF-16')}")
        found = decode(self.path.read_bytes(), self.path)
        self.report.decoded(self.path, found)
        return found.text.encode(errors="replace")

    def _pieces(self, data: bytes, report: ReadReport | None = None) -> list[str]:
        """Lines together, of about PIECE bytes."""
        parts = [b""]
        for line in data.splitlines(keepends=True):
            if len(parts[-1]) >= PIECE:
                parts.append(b"")
            parts[-1] += line
        found = [decode(part, self.path, "utf-8") for part in parts]
        if report:
            for part in found:
                report.decoded(self.path, part)
        return [part.text for part in found]


def _stretch(file: Any, length: int) -> bytes:
    """At least `length` bytes up to the end of a line; a very long line is cut between two characters."""
    data: bytes = file.read(length)
    if data and not data.endswith(b"\n"):
        data += file.readline(LONGEST_LINE)
    while not data.endswith(b"\n") and (ahead := file.peek(1)[:1]) and _inside(data, ahead):
        data += file.read(1)
    return data


def _inside(data: bytes, ahead: bytes) -> bool:
    """Whether a character, or a line end, begins in `data` and goes on with the next byte."""
    return ahead[0] & 0xC0 == 0x80 or (data.endswith(b"\r") and ahead == b"\n")


class Rows:
    """Rows of a table; consecutive rows with the same id are the pieces of one document, in order."""

    has_boundaries, joiner = True, "\n\n"

    def __init__(self, path: Path, text: str, document: str, report: ReadReport | None = None) -> None:
        self.path, self.name, self.report = path, str(path), report or ReadReport()
        self.text, self.document = text, document

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        """(place, text, document id or None) of every row; bad ones are complained of and have no text."""
        raise NotImplementedError

    def read(self, place: int, span: int) -> list[str]:
        """The texts of consecutive rows."""
        raise NotImplementedError

    def scan(self) -> Iterator[Unit]:
        unit: Unit | None = None
        for place, value, name in self.rows():
            text = self.cleaned(value)
            self.report.line_ends[str(self.path)] += (value or "").count("\r\n")
            if unit is not None and name is not None and name == unit.name:
                unit.pieces.append(text)
            else:
                if unit is not None:
                    yield unit._replace(span=len(unit.pieces))
                unit = Unit(place, 1, [text], name)
        if unit is not None:
            yield unit._replace(span=len(unit.pieces))

    def checked(self, value: Any, row: int) -> str | None:
        """The text of a row counted from 1; None for an empty one, or for what is not a text, which is noted."""
        if value is None or isinstance(value, str):
            return value
        self.report.complain(self.path, f"a {type(value).__name__} in column {safe_name(self.text)}, not a text", row)
        return None

    def cleaned(self, value: Any) -> str:
        """The text of a cell as `scan` gives it."""
        return value.replace("\r\n", "\n") if isinstance(value, str) else ""


class ParquetRows(Rows):
    """A parquet file, read a batch at a time; going back starts at the row group."""

    _next, _last = 0, -1  # the row that comes next, and the row group it is in
    _ahead: Iterator[Any]

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        with self._open() as file:
            columns = [self.text, *([self.document] if self.document in file.schema_arrow.names else [])]
            place = 0
            for batch in file.iter_batches(BATCH, columns=columns):
                ids = batch.column(1).to_pylist() if len(columns) == 2 else [None] * len(batch)
                for value, name in zip(batch.column(0).to_pylist(), ids, strict=True):
                    yield place, self.checked(value, place + 1), None if name is None else str(name)
                    place += 1

    def read(self, place: int, span: int) -> list[str]:
        group = bisect_right(self._ends, place)
        if place < self._next or group > self._last:
            self._next = self._ends[group - 1] if group else 0
            self._ahead = self._texts(group)
        for _ in range(place - self._next):
            next(self._ahead)
        found = [self.cleaned(next(self._ahead)) for _ in range(span)]
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

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        place = 0
        with self.path.open("rb") as file:
            if not encoding(file.peek(4)[:4]).startswith("utf-8"):
                raise DataError(f"{self.path} is not UTF-8: {remedy(self.path, 'UTF-16')}")
            for number, line in enumerate(file, 1):
                row = self.row(line)
                if isinstance(row, str):
                    self.report.complain(self.path, row, number)
                    yield place, None, None
                else:
                    name = row.get(self.document)
                    yield place, self.checked(row[self.text], number), None if name is None else str(name)
                place += len(line)

    def read(self, place: int, span: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(place)
            rows = [self.row(file.readline()) for _ in range(span)]
        return [self.cleaned(row[self.text]) if isinstance(row, dict) else "" for row in rows]

    def row(self, line: bytes) -> dict[str, Any] | str:
        """One line as a dict that has the text, or what is wrong with it."""
        try:
            row = parse_line(line.removeprefix(BOM_UTF8)) if line.strip() else {self.text: ""}
        except UnicodeDecodeError:
            return "bytes that are not UTF-8"
        except ValueError as error:
            return str(error)
        if not isinstance(row, dict) or self.text not in row:
            return f"no {safe_name(self.text)}{suggest(self.text, row) if isinstance(row, dict) else ''}"
        if b"\\u" in line and any("\ud800" <= sign <= "\udfff" for sign in str(row[self.text])):
            return "half of a character (a lone surrogate)"
        return row


def readers(files: Sequence[Path], text: str, document: str, report: ReadReport | None = None) -> list[Reader]:
    """A reader per file, or one for all txt files that are documents."""
    tables = {".parquet": ParquetRows, ".jsonl": JsonLines}
    rows = [path for path in files if suffix(path) in tables]
    found: list[Reader] = [tables[suffix(path)](path, text, document, report) for path in rows]
    texts = [path for path in files if suffix(path) not in tables]
    if len(texts) == 1 or any(path.stat().st_size > LARGE for path in texts):
        return found + [LongText(path, report) for path in texts]
    return found + ([WholeFiles(texts, report)] if texts else [])
