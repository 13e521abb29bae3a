"""Signals: a run that is asked to stop saves what it has and leaves; the same command goes on."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
EXIT_TEMPFAIL = 75  # a temporary failure (EX_TEMPFAIL): the same command may be tried again


class Interrupted(SystemExit):
    """Ends the process, a sweep included, with exit code 75."""

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_TEMPFAIL)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}: what was learned is saved, the same command goes on"


class GracefulShutdown:
    """Catches the signals while it is entered. Inside `deferred` a signal waits; elsewhere the run leaves at once.

    `save` is called first where nothing is held. A second SIGINT ends the process as Python does by itself.
    """

    def __init__(self) -> None:
        self.pending_signal: int | None = None  # the signal that waits
        self.save: Callable[[], object] = lambda: None
        self.before: dict[int, Any] = {}
        self.holding = self.pressed = False

    def __enter__(self) -> "GracefulShutdown":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.before = {signum: signal.signal(signum, self.handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if signum == signal.SIGINT and self.pressed:
            signal.default_int_handler(signum, frame)
        self.pressed |= signum == signal.SIGINT
        self.pending_signal = signum
        if not self.holding:
            with self.deferred():
                self.save()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals inside are answered at its end, or where `exit_if_requested` is called."""
        outer, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = outer
        if not outer:
            self.exit_if_requested()

    def exit_if_requested(self) -> None:
        """Leaves if a signal asked to; a handler that was there before, such as submitit's, decides how.

        submitit's for SIGUSR2 requeues the job and ends the process, its for SIGTERM returns: then the run goes on. But
        SLURM's SIGTERM is the last word before SIGKILL. A job that SLURM has requeued or cancelled leaves at once; one
        that it still takes for running, as in the grace time of a preemption, is requeued first.
        """
        signum, self.pending_signal = self.pending_signal, None
        if signum is None:
            return
        if signum == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            if not running():
                raise Interrupted(signum)
            signum = signal.SIGUSR2
        handler = self.before.get(signum)
        if not callable(handler) or handler is signal.default_int_handler:
            raise Interrupted(signum)
        handler(signum, None)


def running() -> bool:
    """Whether SLURM takes the job of this process for running."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return True
    return said.stdout.strip() == "RUNNING"
