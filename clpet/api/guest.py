"""Runs clpet inside a process that belongs to another program, and leaves that process as it was."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from clpet.api.words import as_clpet_errors
from clpet.config.compose import add_plugin_dir
from clpet.escape import EscapingFormatter
from clpet.records import Json
from clpet.runtime.signals import Interrupted

PLUGINS = "CLPET_CONFIG_DIR"  # environment variable with the folders of the user's own classes
STDERR_FORMAT = "%(levelname)s: %(message)s"
FILE_FORMAT = "[%(asctime)s][%(levelname)s] %(message)s"
log = logging.getLogger("clpet")


@contextlib.contextmanager
def guest(config_dir: str | Path | None = None) -> Iterator[None]:
    """A block with the classes of `config_dir`, the logging of the command line, and errors as ClpetError.

    Ctrl-C raises KeyboardInterrupt after the progress has been saved; a signal that ends a process, such as SIGTERM, is
    raised again for the handlers of the program.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_plugins(config_dir))
        stack.enter_context(_warnings())
        try:
            with as_clpet_errors():
                yield
        except Interrupted as stopped:
            stack.close()
            if stopped.signum != signal.SIGINT:
                signal.raise_signal(stopped.signum)
            raise KeyboardInterrupt("progress is saved: the same call resumes the run") from None


@contextlib.contextmanager
def _plugins(config_dir: str | Path | None) -> Iterator[None]:
    before = os.environ.get(PLUGINS)
    try:
        if config_dir is not None:
            add_plugin_dir(os.path.expanduser(config_dir))
        yield
    finally:
        os.environ.pop(PLUGINS, None)
        if before is not None:
            os.environ[PLUGINS] = before


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Prints warnings to stderr as the command line does, unless the program has set up its own logging."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(EscapingFormatter(STDERR_FORMAT))
    with handled(handler) if not logging.getLogger().handlers else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends what clpet logs in a block to a file, as the command line does in train.log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(EscapingFormatter(FILE_FORMAT))
    with handled(handler):
        yield


def process_logging(path: Path) -> dict[str, Json]:
    """The same for the processes of a run, as a configuration of `logging`: the log file, and warnings to stderr."""
    formats = {"file": FILE_FORMAT, "stderr": STDERR_FORMAT}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            name: {"class": "clpet.escape.EscapingFormatter", "format": text} for name, text in formats.items()
        },
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(path), "formatter": "file"},
            "stderr": {"class": "logging.StreamHandler", "formatter": "stderr", "level": "WARNING"},
        },
        "loggers": {"clpet": {"handlers": ["file", "stderr"], "level": "INFO"}},
    }


@contextlib.contextmanager
def handled(handler: logging.Handler) -> Iterator[None]:
    """Adds a handler to clpet's logger for a block."""
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
