"""Names from data in each output format: what a terminal, Markdown, LaTeX or a spreadsheet would obey becomes text."""

import logging
import re
import reprlib
import unicodedata
from typing import Any

JOINERS = "\u200c\u200d"  # zero width, and part of many scripts
NUMBER = re.compile(
    r"-|[-+]?(\d[\d.,]*|inf|nan)(e[-+]?\d+)?( ± [\d.]+)?"
)  # also a missing one, and one with its spread
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "±": r"$\pm$", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}  # fmt: skip

LONGEST = 40  # characters of a value from data in a message
LONGEST_NAME = 60
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 2
_SHORT.maxlevel = 3


def printable(text: str, kept: str = "\n") -> str:
    """The text with `\\x1b` and the like in place of what a terminal obeys; characters in `kept` stay as they are.

    These are control characters, marks that reverse the direction of writing and halves of surrogate pairs.
    """
    return "".join(sign if sign in kept or _visible(sign) else _code(sign) for sign in text)


def _visible(sign: str) -> bool:
    return sign.isprintable() or sign in JOINERS or unicodedata.category(sign) == "Zs"


def _code(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def inline(text: str) -> str:
    """A name on a terminal or in a picture: printable, in one line."""
    return printable(text, kept="")


def short_repr(value: Any) -> str:
    """A value from data in a message: quoted, escaped, and cut where it is long."""
    return _SHORT.repr(value)


def safe_name(name: str) -> str:
    """A name from data in a message: as it is, or quoted and cut where it is long or has spaces at its ends."""
    return name if name == inline(name).strip() and 0 < len(name) <= LONGEST_NAME else short_repr(name)


def markdown(text: str) -> str:
    """A cell of a Markdown table. An underscore inside a word is left: it marks nothing there."""
    return re.sub(r"[\\|`*<\[\]&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", inline(text))


def spreadsheet(text: str) -> str:
    """A cell of a CSV file: a name that a spreadsheet would compute as a formula begins with an apostrophe."""
    found = inline(text)
    return f"'{found}" if re.match(r"[=+\-@＝＋－＠]", found) and not NUMBER.fullmatch(found) else found


def latex(text: str) -> str:
    """A cell of a LaTeX table."""
    return "".join(LATEX.get(sign, sign) for sign in inline(text))


class EscapingFormatter(logging.Formatter):
    """Formats log records for a terminal; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as printable text."""
        return printable(super().format(record))
