"""Graceful shutdown: on a signal the run saves its progress and exits; the same command resumes it."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
EXIT_TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, the command may be retried


Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal returns it


class Interrupted(SystemExit):
    """Ends the process, a sweep included, with exit code 75."""

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_TEMPFAIL)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; progress is saved, re-run the same command to resume"


class GracefulShutdown:
    """Context manager that catches SIGNALS. Inside `deferred` a signal is only recorded; outside the run exits at once.

    Before an exit outside `deferred`, `save` is called. A second SIGINT raises KeyboardInterrupt, as in plain Python.
    """

    def __init__(self) -> None:
        self.pending_signal: int | None = None
        self.save: Callable[[], object] = lambda: None
        self.previous_handlers: dict[int, Handler] = {}
        self.is_deferred = self.sigint_received = False

    def __enter__(self) -> "GracefulShutdown":
        if threading.current_thread() is threading.main_thread():  # Python installs handlers only in the main thread
            self.previous_handlers = {signum: signal.signal(signum, self.handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if signum == signal.SIGINT and self.sigint_received:
            signal.default_int_handler(signum, frame)
        self.sigint_received |= signum == signal.SIGINT
        self.pending_signal = signum
        if not self.is_deferred:
            with self.deferred():  # a further signal while saving must not start a second save
                self.save()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers signals to the end of the outermost block, or to a call of `exit_if_requested` inside it."""
        outer, self.is_deferred = self.is_deferred, True
        try:
            yield
        finally:
            self.is_deferred = outer
        if not outer:
            self.exit_if_requested()

    def exit_if_requested(self) -> None:
        """Exits if a signal is pending, by calling its previous handler, such as submitit's, if there is one.

        submitit's handler of SIGUSR2 requeues the job and ends the process; its handler of SIGTERM returns, and the run
        would continue. But SLURM follows SIGTERM with SIGKILL. So on SIGTERM under SLURM: a job that SLURM has already
        requeued or cancelled exits at once; one that still counts as running, as in the grace time of a preemption, is
        requeued first, by submitit's handler of SIGUSR2.
        """
        signum, self.pending_signal = self.pending_signal, None
        if signum is None:
            return
        if signum == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            if not slurm_job_is_running():
                raise Interrupted(signum)
            signum = signal.SIGUSR2
        handler = self.previous_handlers.get(signum)
        if not callable(handler) or handler is signal.default_int_handler:
            raise Interrupted(signum)
        handler(signum, None)


def slurm_job_is_running() -> bool:
    """Whether SLURM lists the job of this process as RUNNING; True where squeue cannot be called."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return True
    return answer.stdout.strip() == "RUNNING"
