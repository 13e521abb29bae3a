"""Runs of a sweep in parallel on this machine (hardware.parallel_runs). Imports torch only to count GPUs.

Every run is a separate process, `clpet train` with the run's overrides, so it saves, resumes, fails and handles signals
like a run started by hand. hydra-joblib-launcher is not used because it reuses processes and ends them without
a checkpoint, and submitit's local executor because it starts all runs at once.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.types import RunMode

from clpet.cli.sweep_screen import SweepRun, SweepScreen
from clpet.config.schema import require
from clpet.errors import ClpetError, ConfigError
from clpet.escape import inline
from clpet.runtime.signals import GracefulShutdown

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

CLPET = [sys.executable, "-m", "clpet", "train"]
POLL_SECONDS = 0.2  # between checks for a signal
SHOWN_PREFIXES = ("WARNING: ", "ERROR: ", "CRITICAL: ")  # lines of a run's output that are passed on
SWEEP_OVERRIDES = ("hydra.mode=", "hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper")


@dataclass
class Job:
    """One run of a sweep."""

    number: int  # from 1
    varied: list[str]  # the overrides that differ between the runs
    words: list[str]  # arguments of its `clpet train`
    out: Path  # run directory

    def print(self, text: str) -> None:
        """Prints a line that begins with the run's number and varied overrides."""
        print(inline(f"[{self.number}] {' '.join(self.varied) or self.out}: {text}"), flush=True)


class RunError(ClpetError):
    """The error with which a run of a sweep ended."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class ParallelSweep:
    """Collects the runs of a sweep while Hydra passes through them, then carries them out in parallel."""

    def __init__(self, flags: Sequence[str]) -> None:
        self.flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        self.jobs: dict[Path, Job] = {}
        self.environments: list[dict[str, str]] = []  # one per run that may be active at a time

    def takes(self, cfg: "DictConfig", hydra: "HydraConf", varied: list[str]) -> bool:
        """Whether `run` will carry out this run; raises ConfigError if other options do not allow parallel runs."""
        count = cfg.hardware.get("parallel_runs", 1)
        require(type(count) is int and count >= 1, "hardware.parallel_runs", count, "at least 1")
        if hydra.mode is not RunMode.MULTIRUN or count == 1 or cfg.dry_run:
            return False
        if "BasicLauncher" not in hydra.launcher._target_:
            raise ConfigError(
                "hardware.parallel_runs is for runs on this machine; on SLURM set hydra.launcher.array_parallelism"
            )
        if "BasicSweeper" not in hydra.sweeper._target_:
            raise ConfigError(
                "hardware.parallel_runs needs Hydra's basic sweeper: other sweepers wait for the score of every run"
            )
        if cfg.hardware.get("ranks", 1) != 1:
            raise ConfigError(f"hardware.parallel_runs needs hardware.ranks=1, not {cfg.hardware.ranks}")
        self.environments = self.environments or environments(cfg, count)
        out = Path(hydra.runtime.output_dir)
        overrides = [word for word in hydra.overrides.hydra if not word.lstrip("+~").startswith(SWEEP_OVERRIDES)]
        job = Job(hydra.job.num + 1, varied, [*self.flags, *overrides, *hydra.overrides.task], out)
        self.jobs.setdefault(out, job)  # a sweep may contain a run twice
        return True

    def run(self, screen: SweepScreen | None) -> list[tuple[str, Exception]]:
        """Carries out the runs, at most hardware.parallel_runs at a time; [(varied overrides, error)] of failed runs.

        `screen` prints the runs that have ended. A signal is passed on to the active runs; when they have saved,
        Interrupted is raised here.
        """
        if not self.jobs:
            return []
        if screen:
            screen.total, screen.at_once = len(self.jobs), len(self.environments)
        pool = Pool(self.environments, screen)
        with GracefulShutdown() as shutdown, shutdown.deferred(), ThreadPoolExecutor(len(self.environments)) as threads:
            futures = [threads.submit(pool.run, job) for job in self.jobs.values()]
            try:
                while wait(futures, POLL_SECONDS).not_done:
                    if shutdown.pending_signal is not None and not pool.stopped:
                        pool.stop(shutdown.pending_signal)
            except KeyboardInterrupt:  # a second Ctrl-C ends the runs without saving, as it ends a single run
                pool.stop(signal.SIGINT)
                raise
        errors = [future.result() for future in futures]
        return [(" ".join(job.varied), error) for job, error in zip(self.jobs.values(), errors, strict=True) if error]


def environments(cfg: "DictConfig", count: int) -> list[dict[str, str]]:
    """Environment variables of `count` parallel runs: each gets an equal number of cores, and one of several GPUs."""
    threads_are_set = bool(cfg.hardware.get("threads")) or "OMP_NUM_THREADS" in os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if threads_are_set else {"OMP_NUM_THREADS": str(max(1, cores // count))}
    gpus = [] if cfg.hardware.device == "cpu" else _gpus()
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def _gpus() -> list[str]:
    import torch  # takes seconds, and a sweep on the CPU does not need it

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class Pool:
    """The active processes; each uses one of the environments."""

    environments: list[dict[str, str]]
    screen: SweepScreen | None = None
    stopped: bool = False
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in self.environments:
            self.free.put(environment)

    def stop(self, signum: int) -> None:
        """Passes a signal on to all active runs, and starts no more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signum)

    def run(self, job: Job) -> RunError | None:
        """Carries out one run; returns its error, None if it succeeded or was stopped by a signal."""
        environment = self.free.get()
        try:
            with self.lock:  # a process is either started before `stop` signals all of them, or not at all
                if self.stopped:
                    return None
                process = subprocess.Popen(
                    [*CLPET, *job.words], env={**os.environ, **environment},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                )  # fmt: skip
                self.running.add(process)
            start = time.monotonic()
            last_line = self._follow(process, job)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
            return self._outcome(job, code, last_line, time.monotonic() - start)
        finally:
            self.free.put(environment)

    def _outcome(self, job: Job, code: int, last_line: str, seconds: float) -> RunError | None:
        """Prints how a run ended, and returns its error."""
        message = last_line.removeprefix("clpet: ")
        if code < 0:
            message, code = f"ended by {signal.Signals(-code).name}", 1
        if code and self.stopped:
            job.print(message)
            return None
        if self.screen:
            self.screen.finished(SweepRun(job.number, job.varied, job.out, seconds, message if code else None))
        return RunError(message, code) if code else None

    def _follow(self, process: subprocess.Popen[str], job: Job) -> str:
        """Prints warnings and errors of a run as they appear, equal ones once; returns the last line of its output."""
        last_line = f"{job.out} ended without a message"
        for line in process.stdout or ():
            last_line = line.strip() or last_line
            if last_line.startswith(SHOWN_PREFIXES) and (not self.screen or self.screen.is_new(last_line)):
                job.print(last_line)
        return last_line
