"""Errors a person can act on: one sentence on what was wrong, where, and what would be right."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator

from clpet.escape import safe_name

LISTED = 40  # options that are listed


class ClpetError(Exception):
    """Wrong input. The command line prints the message alone and leaves with `exit_code`."""

    exit_code = 2


class ConfigError(ClpetError):
    """A knob is unknown, of the wrong type, out of range, or does not go with another."""


class DataError(ClpetError):
    """A benchmark's data is missing, incomplete or contradicts itself."""


class ModelError(ClpetError):
    """A backbone is not there or cannot do what is asked of it."""


class HostError(ClpetError):
    """The machine is at fault, not the input: no space, no right to write, numbers that blew up."""

    exit_code = 1


@contextlib.contextmanager
def enough_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Raises HostError where the device or the host has no memory left; `advice` says for what, and what to lower."""
    refused = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        refused = True
    if refused:
        raise HostError(f"out of memory with {advice()}; what was saved before is kept")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest(word: str, options: Iterable[str]) -> str:
    """'; did you mean X?' when one of the options looks like the word, else the first of the options themselves."""
    options = sorted({str(option) for option in options})
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {safe_name(close[0])}?"
    names = [safe_name(option) for option in options[:LISTED]]
    more = f" and {len(options) - LISTED} more" if len(options) > LISTED else ""
    return f"; there are: {', '.join(names)}{more}" if options else ""
