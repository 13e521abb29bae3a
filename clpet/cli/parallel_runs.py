"""The runs of a sweep in parallel on this machine (hardware.parallel_runs). Imports torch only to count GPUs.

Every run is a process of its own, `clpet train` with the run's overrides: it saves, resumes, fails and answers signals
as a run that was started by hand. hydra-joblib-launcher reuses processes and ends them without a checkpoint;
submitit's local executor starts all runs at once.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from clpet.config.schema import require
from clpet.errors import ClpetError, ConfigError
from clpet.escape import inline
from clpet.reporting.tables import is_summary
from clpet.runtime.signals import GracefulShutdown

CLPET = [sys.executable, "-m", "clpet", "train"]
POLL = 0.2  # seconds between looks for a signal
SHOWN = ("WARNING: ", "ERROR: ", "CRITICAL: ")  # of what a run prints, besides the summary of every task
IGNORED = ("hydra.mode=", "hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper")  # of no use to one run


@dataclass
class Job:
    """A run of a sweep: its number, what the sweep varies in it, and the words of its own `clpet train`."""

    number: int
    varied: str
    words: list[str]
    out: Path

    def print(self, text: str) -> None:
        """Prints a line that says which run it is about."""
        print(inline(f"[{self.number}] {self.varied or self.out}: {text}"), flush=True)


class RunError(ClpetError):
    """What ended a run of a sweep, in its own words."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class ParallelSweep:
    """The runs of a sweep, from Hydra's look at each of them to the end of the last one."""

    def __init__(self, flags: Sequence[str]) -> None:
        self.flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        self.jobs: dict[Path, Job] = {}
        self.shares: list[dict[str, str]] = []

    def takes(self, cfg: Any, hydra: Any, varied: str) -> bool:
        """Whether a run is left to `run`. Raises ConfigError where the other options forbid several runs at once."""
        count = cfg.hardware.get("parallel_runs", 1)
        require(type(count) is int and count >= 1, "hardware.parallel_runs", count, "at least 1")
        if hydra.mode is not RunMode.MULTIRUN or count == 1 or cfg.dry_run:
            return False
        if "BasicLauncher" not in hydra.launcher._target_:
            raise ConfigError(
                "hardware.parallel_runs is for runs on this machine; hydra.launcher.array_parallelism is SLURM's"
            )
        if "BasicSweeper" not in hydra.sweeper._target_:
            raise ConfigError(
                "hardware.parallel_runs needs Hydra's basic sweeper: others wait for the score of every run"
            )
        if cfg.hardware.get("ranks", 1) != 1:
            raise ConfigError(f"hardware.parallel_runs needs hardware.ranks=1, not {cfg.hardware.ranks}")
        self.shares = self.shares or environments(cfg, count)
        out = Path(hydra.runtime.output_dir)
        overrides = [word for word in hydra.overrides.hydra if not word.lstrip("+~").startswith(IGNORED)]
        job = Job(hydra.job.num + 1, varied, [*self.flags, *overrides, *hydra.overrides.task], out)
        self.jobs.setdefault(out, job)  # a sweep may name a run twice
        return True

    def run(self) -> list[tuple[str, Exception]]:
        """Carries the runs out, as many at a time as there are shares; (what the sweep varies, error) where one fails.

        A signal is passed on to the runs; when they have saved, Interrupted is raised here.
        """
        if not self.jobs:
            return []
        pool = Pool(self.shares)
        with GracefulShutdown() as shutdown, shutdown.deferred(), ThreadPoolExecutor(len(self.shares)) as threads:
            futures = [threads.submit(pool.run, job) for job in self.jobs.values()]
            try:
                while wait(futures, POLL).not_done:
                    if shutdown.pending_signal is not None and not pool.stopped:
                        pool.stop(shutdown.pending_signal)
            except KeyboardInterrupt:  # a second Ctrl-C: the runs are to end without saving, as one alone would
                pool.stop(signal.SIGINT)
                raise
        found = [future.result() for future in futures]
        return [(job.varied, error) for job, error in zip(self.jobs.values(), found, strict=True) if error]


def environments(cfg: Any, count: int) -> list[dict[str, str]]:
    """The variables that give each of `count` runs its share of the cores, and of several GPUs one."""
    own = bool(cfg.hardware.get("threads")) or "OMP_NUM_THREADS" in os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = {} if own else {"OMP_NUM_THREADS": str(max(1, cores // count))}
    gpus = [] if cfg.hardware.device == "cpu" else _gpus()
    return [{**shares, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def _gpus() -> list[str]:
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class Pool:
    """The processes that are running now; every one holds one of the shares of the machine."""

    shares: list[dict[str, str]]
    stopped: bool = False
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for share in self.shares:
            self.free.put(share)

    def stop(self, signum: int) -> None:
        """Passes a signal on to all runs, and starts no more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signum)

    def run(self, job: Job) -> RunError | None:
        """Carries out one run; the error that its process ended with, None if all is well or it was stopped."""
        share = self.free.get()
        try:
            with self.lock:
                if self.stopped:
                    return None
                process = subprocess.Popen(
                    [*CLPET, *job.words], env={**os.environ, **share},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                )  # fmt: skip
                self.running.add(process)
            job.print("started")
            last = _follow(process, job)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
            return self._ended(job, code, last)
        finally:
            self.free.put(share)

    def _ended(self, job: Job, code: int, last: str) -> RunError | None:
        if code == 0:
            job.print(f"finished (clpet show {job.out})")
            return None
        said = last.removeprefix("clpet: ")
        if code < 0:
            said, code = f"ended by {signal.Signals(-code).name}", 1
        job.print(said)
        return None if self.stopped else RunError(said, code)


def _follow(process: subprocess.Popen, job: Job) -> str:
    """Prints what is to be seen of a run's output while it comes; the last line."""
    lines: deque[str] = deque([f"{job.out} ended without a message"], maxlen=1)
    for line in process.stdout or ():
        if text := line.strip():
            lines.append(text)
        if is_summary(text) or text.startswith(SHOWN):
            job.print(text)
    return lines[-1]
