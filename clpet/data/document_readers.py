"""Readers of plain text in files: each scans its documents once and can read any of them again later.

A reader never holds more than one document and one batch of rows in memory. `scan` yields every document with its
position; `read` returns the pieces of the document at a position.
"""

from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BufferedReader, BytesIO, RawIOBase
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from clpet.data.data_files import is_compressed, read_bytes, suffix
from clpet.data.decoding import decode, encoding, remedy
from clpet.data.read_report import ReadReport
from clpet.data.tabular_files import SplitRows, read_table
from clpet.errors import DataError, suggest
from clpet.escape import safe_name
from clpet.records import Json
from clpet.runtime.json_lines import parse_line

if TYPE_CHECKING:
    import pyarrow.parquet

PIECE = 2000  # bytes of a piece of a long text without document boundaries, extended to the end of a line
STRETCH = 65536  # maximum bytes of such a text that are read together, extended to the end of a line
LONGEST_LINE = 65536
BATCH = 256  # rows of a parquet file that are decoded at a time
LARGE = 16 << 20  # bytes above which a txt file is not treated as one document


class Unit(NamedTuple):
    """One document, or one stretch of a text without document boundaries."""

    position: int  # index of a text or file, row number or byte offset, as the reader counts
    span: int  # number of texts, rows or bytes
    pieces: list[str]
    name: str | None  # its id, if the file has ids


class Reader(Protocol):
    """A source of documents. Without `has_boundaries` its units are consecutive stretches of one text."""

    has_boundaries: bool
    joiner: str  # string between the pieces of a document
    name: str  # its name in messages
    report: ReadReport

    def scan(self) -> Iterator[Unit]:
        """All documents in order."""

    def read(self, position: int, span: int) -> list[str]:
        """The pieces of the document that `scan` yielded with this position and span."""


class Strings:
    """Texts in memory, one document each."""

    has_boundaries, joiner, name = True, "", "texts in memory"

    def __init__(self, texts: Iterable[str], report: ReadReport | None = None) -> None:
        self.texts, self.report = list(texts), report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        for position, text in enumerate(self.texts):
            yield Unit(position, 1, [text], None)

    def read(self, position: int, span: int) -> list[str]:
        return [self.texts[position]]


class TextFiles:
    """Text files, one document each."""

    has_boundaries, joiner, name = True, "", "txt files"

    def __init__(self, paths: Sequence[Path], report: ReadReport | None = None) -> None:
        self.paths, self.report = paths, report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        for position, path in enumerate(self.paths):
            decoded = decode(read_bytes(path), path)
            self.report.add_decoded(path, decoded)
            yield Unit(position, 1, [decoded.text], None)

    def read(self, position: int, span: int) -> list[str]:
        path = self.paths[position]
        return [decode(read_bytes(path), path).text]


class LongText:
    """One long text without document boundaries, in stretches that end at the end of a line."""

    has_boundaries, joiner = False, ""

    def __init__(self, path: Path, report: ReadReport | None = None) -> None:
        self.path, self.name, self.report = path, str(path), report or ReadReport()

    def scan(self) -> Iterator[Unit]:
        length = min(STRETCH, max(PIECE, self.path.stat().st_size // 1000))
        with self._open() as file:
            position = file.tell()
            while data := _read_stretch(file, length):
                yield Unit(position, len(data), self._pieces(data, self.report), None)
                position += len(data)

    def read(self, position: int, span: int) -> list[str]:
        with self._open() as file:
            file.seek(position)
            return self._pieces(file.read(span))

    def _open(self) -> BufferedReader:
        """The file as UTF-8, after its byte order mark; a compressed file, or another encoding, is read into memory."""
        file = self.path.open("rb")
        codec = encoding(file.peek(4)[:4])
        if codec.startswith("utf-8") and not is_compressed(self.path):
            file.seek(3 if codec == "utf-8-sig" else 0)
            return file
        file.close()
        raw = cast(RawIOBase, BytesIO(self._converted))
        return BufferedReader(raw)  # has `peek`, which _read_stretch needs

    @cached_property
    def _converted(self) -> bytes:
        if self.path.stat().st_size > LARGE:
            fix = "decompress it" if is_compressed(self.path) else remedy(self.path, "UTF-16")
            raise DataError(f"{self.path} is too large to be converted while reading: {fix}")
        decoded = decode(read_bytes(self.path), self.path)
        self.report.add_decoded(self.path, decoded)
        return decoded.text.encode(errors="replace")

    def _pieces(self, data: bytes, report: ReadReport | None = None) -> list[str]:
        """The lines of a stretch, grouped into pieces of about PIECE bytes."""
        pieces = [b""]
        for line in data.splitlines(keepends=True):
            if len(pieces[-1]) >= PIECE:
                pieces.append(b"")
            pieces[-1] += line
        decoded = [decode(piece, self.path, "utf-8") for piece in pieces]
        if report:
            for piece in decoded:
                report.add_decoded(self.path, piece)
        return [piece.text for piece in decoded]


def _read_stretch(file: BufferedReader, length: int) -> bytes:
    """At least `length` bytes up to the end of a line; a very long line is cut between two characters."""
    data: bytes = file.read(length)
    if data and not data.endswith(b"\n"):
        data += file.readline(LONGEST_LINE)
    while not data.endswith(b"\n") and (ahead := file.peek(1)[:1]) and _inside(data, ahead):
        data += file.read(1)
    return data


def _inside(data: bytes, ahead: bytes) -> bool:
    """Whether the next byte `ahead` belongs to the last character, or to the CRLF, at the end of `data`."""
    return ahead[0] & 0xC0 == 0x80 or (data.endswith(b"\r") and ahead == b"\n")


class TableReader:
    """Base of readers of tables: consecutive rows with the same id are the pieces of one document, in order."""

    has_boundaries, joiner = True, "\n\n"

    def __init__(self, path: Path, text: str, document: str, report: ReadReport | None = None) -> None:
        self.path, self.name, self.report = path, str(path), report or ReadReport()
        self.text, self.document = text, document

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        """(position, text, document id or None) of every row; a bad row is reported and has no text."""
        raise NotImplementedError

    def read(self, position: int, span: int) -> list[str]:
        """The texts of consecutive rows."""
        raise NotImplementedError

    def scan(self) -> Iterator[Unit]:
        unit: Unit | None = None
        for position, value, name in self.rows():
            text = self.cleaned(value)
            self.report.line_ends[str(self.path)] += (value or "").count("\r\n")
            if unit is not None and name is not None and name == unit.name:
                unit.pieces.append(text)
            else:
                if unit is not None:
                    yield unit._replace(span=len(unit.pieces))
                unit = Unit(position, 1, [text], name)
        if unit is not None:
            yield unit._replace(span=len(unit.pieces))

    def checked(self, value: object, row: int) -> str | None:
        """The text of a row (numbered from 1); None if it is empty, and if it is not a text, which is reported."""
        if value is None or isinstance(value, str):
            return value
        self.report.add_bad_row(
            self.path, f"a {type(value).__name__} in column {safe_name(self.text)}, not a text", row
        )
        return None

    def cleaned(self, value: object) -> str:
        """A cell as `scan` yields it: with \\n as line end, empty if it is not a text."""
        return value.replace("\r\n", "\n") if isinstance(value, str) else ""


class ParquetReader(TableReader):
    """A parquet file, decoded a batch at a time. To go back, it restarts at the beginning of a row group."""

    _next_row, _row_group = 0, -1  # of `_texts_ahead`: its next row, and the row group of that row
    _texts_ahead: Iterator[object]

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        with self._open() as file:
            columns = [self.text, *([self.document] if self.document in file.schema_arrow.names else [])]
            position = 0
            for batch in file.iter_batches(BATCH, columns=columns):
                ids = batch.column(1).to_pylist() if len(columns) == 2 else [None] * len(batch)
                for value, name in zip(batch.column(0).to_pylist(), ids, strict=True):
                    yield position, self.checked(value, position + 1), None if name is None else str(name)
                    position += 1

    def read(self, position: int, span: int) -> list[str]:
        group = bisect_right(self._group_ends, position)
        # Reading on is cheaper than reopening the file, unless the position is behind or in a later row group.
        if position < self._next_row or group > self._row_group:
            self._next_row = self._group_ends[group - 1] if group else 0
            self._texts_ahead = self._texts(group)
        for _ in range(position - self._next_row):
            next(self._texts_ahead)
        texts = [self.cleaned(next(self._texts_ahead)) for _ in range(span)]
        self._next_row = position + span
        self._row_group = bisect_right(self._group_ends, self._next_row)
        return texts

    def _texts(self, group: int) -> Iterator[object]:
        with self._open() as file:
            for batch in file.iter_batches(BATCH, row_groups=range(group, len(self._group_ends)), columns=[self.text]):
                yield from batch.column(0).to_pylist()

    @cached_property
    def _group_ends(self) -> list[int]:
        """The number of the row after the last one of every row group."""
        with self._open() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return list(accumulate(sizes))

    def _open(self) -> "pyarrow.parquet.ParquetFile":
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        if self.text not in file.schema_arrow.names:
            raise DataError(f"{self.path} has no column {self.text}{suggest(self.text, file.schema_arrow.names)}")
        return file


class JsonLinesReader(TableReader):
    """A jsonl file; positions are byte offsets."""

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        position = 0
        with self._open() as file:
            if not encoding(file.peek(4)[:4]).startswith("utf-8"):
                raise DataError(f"{self.path} is not UTF-8: {remedy(self.path, 'UTF-16')}")
            for number, line in enumerate(file, 1):
                row = self.row(line)
                if isinstance(row, str):
                    self.report.add_bad_row(self.path, row, number)
                    yield position, None, None
                else:
                    name = row.get(self.document)
                    yield position, self.checked(row[self.text], number), None if name is None else str(name)
                position += len(line)

    def read(self, position: int, span: int) -> list[str]:
        with self._open() as file:
            file.seek(position)
            rows = [self.row(file.readline()) for _ in range(span)]
        return [self.cleaned(row[self.text]) if isinstance(row, dict) else "" for row in rows]

    def _open(self) -> BufferedReader:
        """The file; a compressed one is read into memory."""
        return (
            BufferedReader(cast(RawIOBase, BytesIO(self._data))) if is_compressed(self.path) else self.path.open("rb")
        )

    @cached_property
    def _data(self) -> bytes:
        return read_bytes(self.path)

    def row(self, line: bytes) -> dict[str, Json] | str:
        """One line as a dict with the text column, or a description of the error."""
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


class RowsReader(TableReader):
    """A csv, tsv or json file, which is held in memory; positions are indices of its rows."""

    def rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        for number, error in self._table.bad.items():
            self.report.add_bad_row(self.path, error, number)
        for position, (number, row) in enumerate(zip(self._table.numbers, self._table.values, strict=True)):
            name = row.get(self.document)
            yield position, self.checked(row[self.text], number), None if name is None else str(name)

    def read(self, position: int, span: int) -> list[str]:
        return [self.cleaned(row[self.text]) for row in self._table.values[position : position + span]]

    @cached_property
    def _table(self) -> SplitRows:
        table = read_table(self.path, self.report)
        table.require(self.text)
        return table


def open_readers(files: Sequence[Path], text: str, document: str, report: ReadReport | None = None) -> list[Reader]:
    """Readers of files by their suffix: one per table and long text, and one for all txt files that are documents.

    A single txt file, and every txt file of a folder with a LARGE one, is a long text without document boundaries.
    """
    table_readers = {".parquet": ParquetReader, ".jsonl": JsonLinesReader}
    table_readers |= dict.fromkeys((".csv", ".tsv", ".json"), RowsReader)
    tables = [path for path in files if suffix(path) in table_readers]
    readers: list[Reader] = [table_readers[suffix(path)](path, text, document, report) for path in tables]
    txt_files = [path for path in files if suffix(path) not in table_readers]
    if len(txt_files) == 1 or any(path.stat().st_size > LARGE for path in txt_files):
        return readers + [LongText(path, report) for path in txt_files]
    return readers + ([TextFiles(txt_files, report)] if txt_files else [])
