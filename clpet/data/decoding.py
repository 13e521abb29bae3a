"""Decodes files as text: in the encoding of their byte order mark, or in UTF-8 without one."""

import codecs
from pathlib import Path
from typing import NamedTuple

from clpet.errors import DataError

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


class Decoded(NamedTuple):
    """A decoded text, with counts of what was changed."""

    text: str
    codec: str
    replaced: int = 0  # invalid bytes, replaced by U+FFFD
    line_ends: int = 0  # Windows line ends (CRLF), replaced by line feeds


def encoding(head: bytes) -> str:
    """The codec of a file by its first four or more bytes."""
    return next((codec for mark, codec in MARKS.items() if head.startswith(mark)), "utf-8")


def decode(data: bytes, path: Path, codec: str | None = None) -> Decoded:
    """Plain text, with invalid bytes replaced and Windows line ends as \\n. Raises DataError for a binary file."""
    codec = codec or encoding(data)
    replaced = 0

    def replace(error: UnicodeError) -> tuple[str, int]:
        nonlocal replaced
        assert isinstance(error, UnicodeDecodeError)
        replaced += error.end - error.start
        return "\ufffd", error.end

    _check_zeros(data, codec, path)
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        codecs.register_error("clpet.replace", replace)
        text = data.decode(codec, "clpet.replace")
    ends = text.count("\r\n")
    return Decoded(text.replace("\r\n", "\n") if ends else text, codec, replaced, ends)


def decode_strictly(data: bytes, path: Path, codec: str | None = None) -> Decoded:
    """The unchanged text of a table, in `codec` unless it has a byte order mark. Raises DataError for a bad byte."""
    marked = encoding(data)
    codec = codec if codec and marked == "utf-8" else marked
    _check_zeros(data, codec, path)
    try:
        return Decoded(data.decode(codec), codec)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{data[error.start]:02x} in line {line}" if codec.startswith("utf-8") else error.reason
        raise DataError(
            f"{path} is not {codec.removesuffix('-sig').upper()} ({reason}): {remedy(path)}, or set "
            f"benchmark.encoding={likely_codec(data)}"
        ) from None


def likely_codec(data: bytes) -> str:
    """The likeliest encoding of bytes that are not UTF-8: Windows' own, where it has a character for every byte.

    Many zero bytes are every second byte of UTF-16.
    """
    if has_many_zeros(data):
        return "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def invalid_lines(data: bytes) -> list[int]:
    """The numbers, from 1, of the lines with bytes that are not UTF-8."""
    return [number for number, line in enumerate(data.split(b"\n"), 1) if not _is_utf8(line)]


def _is_utf8(line: bytes) -> bool:
    try:
        return bool(line.decode() or True)
    except UnicodeDecodeError:
        return False


def has_many_zeros(data: bytes) -> bool:
    """Whether more than an eighth of the bytes are zero, as in UTF-16 and in binary files."""
    return 8 * data.count(0) > len(data)


def _check_zeros(data: bytes, codec: str, path: Path) -> None:
    if codec.startswith("utf-8") and has_many_zeros(data):
        raise DataError(f"{path} is not UTF-8 (UTF-16 without a byte order mark?): {remedy(path, 'UTF-16LE')}")


def remedy(path: Path, codec: str = "LATIN1") -> str:
    """The command that converts a file to UTF-8, for messages."""
    return f"convert it, for example with iconv -f {codec} -t UTF-8 {path.name} > new{path.suffix}"
