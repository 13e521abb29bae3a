"""Fixtures of the API's tests: every test works in an empty folder and leaves the process as it was."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def unchanged_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Working folder, logging, signal handlers, plug-in folder and Hydra's state are the same after the test."""
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    before = _process_state()
    yield
    assert _process_state() == before
    assert not GlobalHydra.instance().is_initialized()


def _process_state() -> tuple[object, ...]:
    loggers = [logging.getLogger(name) for name in (None, "clpet", "hydra")]
    handlers = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    return os.getcwd(), handlers, signals, os.environ.get("CLPET_CONFIG_DIR")
