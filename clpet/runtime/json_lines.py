"""JSON Lines, the only reader of them: one JSON value per line.

Every reader shares the treatment of blank lines, the numbering of lines, and the wording of errors.
"""

import json
from collections.abc import Callable, Iterator

from clpet.records import Json

PairsHook = Callable[[list[tuple[str, Json]]], Json]  # see json.loads


def parse_line(line: str | bytes, object_pairs_hook: PairsHook | None = None) -> Json:
    """The value of one line. Raises ValueError (UnicodeDecodeError for bytes that are not UTF-8)."""
    try:
        value: Json = json.loads(line, object_pairs_hook=object_pairs_hook)
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg}, column {error.colno})") from error


def parse_lines(text: str, object_pairs_hook: PairsHook | None = None) -> Iterator[tuple[int, Json | ValueError]]:
    """(line number from 1, value) of every line that is not blank.

    An invalid line yields its ValueError instead of raising it, so that a reader can report all bad lines at once.
    """
    # Not str.splitlines: it also splits at characters such as U+2028, which JSON strings may contain unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_line(line, object_pairs_hook)
            except ValueError as error:
                yield number, error


def parse_rows(text: str, object_pairs_hook: PairsHook | None = None) -> Iterator[tuple[int, Json | ValueError]]:
    """(number from 1, value) of the items of a JSON list, or of the lines as `parse_lines` yields them.

    Raises ValueError for an invalid list: unlike lines, its items cannot be read one by one.
    """
    if text.lstrip()[:1] == "[":
        return iter(enumerate(json.loads(text, object_pairs_hook=object_pairs_hook), 1))
    return parse_lines(text, object_pairs_hook)
