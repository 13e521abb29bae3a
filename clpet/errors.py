"""Errors that the user can fix: one line with what is wrong, where, and how to fix it."""

import contextlib
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator

from clpet.escape import safe_name

MAX_LISTED = 40  # options in a message


class ClpetError(Exception):
    """Wrong input. The command line prints only the message and exits with `exit_code`."""

    exit_code = 2


class ConfigError(ClpetError):
    """An option is unknown, of the wrong type, out of range, or incompatible with another."""


class DataError(ClpetError):
    """The data of a benchmark are missing, incomplete or contradictory."""


class ModelError(ClpetError):
    """A backbone is missing or does not support the configuration."""


class HostError(ClpetError):
    """The input is valid, but the run failed: no space or memory, no permission to write, or diverged training."""

    exit_code = 1


def need_package(package: str, extra: str, what: str, error: type[ClpetError] = ConfigError) -> None:
    """Raises an error for `what` unless a package that only an extra of clpet installs is there."""
    if importlib.util.find_spec(package) is None:
        raise error(f"{what} needs a package that is not installed: pip install 'clpet[{extra}]'")


@contextlib.contextmanager
def enough_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Raises HostError if the device or the host is out of memory; `advice` names the cause and options to lower."""
    out_of_memory = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        out_of_memory = True
    # Outside the except block: `advice` needs memory, which the traceback of the error keeps in use.
    if out_of_memory:
        raise HostError(f"out of memory with {advice()}; the latest checkpoint is kept")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest(word: str, options: Iterable[str]) -> str:
    """'; did you mean X?' if one of the options is similar to the word, else '; available: ' and the first options."""
    options = sorted({str(option) for option in options})
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {safe_name(close[0])}?"
    names = [safe_name(option) for option in options[:MAX_LISTED]]
    more = f" and {len(options) - MAX_LISTED} more" if len(options) > MAX_LISTED else ""
    return f"; available: {', '.join(names)}{more}" if options else ""
