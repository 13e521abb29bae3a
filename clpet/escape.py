"""Escapes names from data for each output format: terminal, Markdown, LaTeX and spreadsheet."""

import logging
import re
import reprlib
import unicodedata

JOINERS = "\u200c\u200d"  # zero-width characters that many scripts need
# Cells that a spreadsheet may read as numbers: also a missing value (-) and mean ± standard deviation.
NUMBER = re.compile(r"-|[-+]?(\d[\d.,]*|inf|nan)(e[-+]?\d+)?( ± [\d.]+)?")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "±": r"$\pm$", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}  # fmt: skip

MAX_VALUE_LENGTH = 40  # characters of a value from data in a message
MAX_NAME_LENGTH = 60
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MAX_VALUE_LENGTH
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 2
_SHORT.maxlevel = 3


def printable(text: str, allowed: str = "\n") -> str:
    """The text with control characters written as codes such as `\\x1b`; those in `allowed` stay as they are.

    Also written as codes: marks that reverse the direction of writing, and halves of surrogate pairs.
    """
    return "".join(char if char in allowed or _is_visible(char) else _code(char) for char in text)


def _is_visible(char: str) -> bool:
    return char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs"


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def inline(text: str) -> str:
    """A name for a terminal or a figure: printable, in one line."""
    return printable(text, allowed="")


def short_repr(value: object) -> str:
    """A value from data for a message: quoted, escaped and truncated."""
    return _SHORT.repr(value)


def safe_name(name: str) -> str:
    """A name from data for a message: quoted and truncated only if it is long, unprintable or has outer spaces."""
    return name if name == inline(name).strip() and 0 < len(name) <= MAX_NAME_LENGTH else short_repr(name)


def markdown(text: str) -> str:
    """A cell of a Markdown table. Underscores inside words stay, since they are not markup there."""
    return re.sub(r"[\\|`*<\[\]&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", inline(text))


def spreadsheet(text: str) -> str:
    """A cell of a CSV file: text that a spreadsheet would compute as a formula gets a leading apostrophe."""
    text = inline(text)
    return f"'{text}" if re.match(r"[=+\-@＝＋－＠]", text) and not NUMBER.fullmatch(text) else text


def latex(text: str) -> str:
    """A cell of a LaTeX table."""
    return "".join(LATEX.get(char, char) for char in inline(text))


class EscapingFormatter(logging.Formatter):
    """Formats log records for a terminal; tracebacks keep their line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as printable text."""
        return printable(super().format(record))
