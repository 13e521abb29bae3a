"""What a sweep prints: a line per finished run, and a closing table. Imports no torch."""

import logging
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpet.errors import DataError
from clpet.escape import inline
from clpet.metrics.transfer_matrix import round2
from clpet.reporting.tables import table
from clpet.runtime.untrusted_json import read_results

NOT_COMPARED = ("seed", "experiment", "debug", "output_dir", "cache_dir", "fresh", "hardware", "tracking", "hydra")


@dataclass
class SweepRun:
    """A run of a sweep that has ended."""

    number: int  # from 1
    varied: Sequence[str]  # the KEY=VALUE words that differ between the runs
    out: Path
    seconds: float
    error: str | None = None  # why it failed
    average: float | None = None
    bwt: float | None = None

    def __post_init__(self) -> None:
        if self.error is None:
            try:
                results = read_results(self.out / "results.json")
            except DataError:
                return
            self.average, self.bwt = results["average"], results["backward_transfer"]

    @property
    def name(self) -> str:
        """The words that differ, or the folder if nothing does."""
        return inline(" ".join(self.varied) or str(self.out))


@dataclass
class SweepScreen:
    """Prints how a sweep of `total` runs proceeds, `at_once` of them at a time; runs may end in several threads."""

    total: int
    output_dir: str
    at_once: int = 1
    runs: list[SweepRun] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    warnings: set[str] = field(default_factory=set)  # those that were printed

    def start(self) -> None:
        """Prints the first line."""
        print(f"sweep of {self.total} runs; each writes its progress to train.log in its folder", flush=True)

    def finished(self, run: SweepRun) -> None:
        """Prints the line of a run that has ended."""
        with self.lock:
            self.runs.append(run)
            figures = f"average {round2(run.average)} · bwt {round2(run.bwt)}" if run.error is None else "failed"
            head = f"run {len(self.runs)} of {self.total}{self._left()}"
            print(f"{head} · {run.name}: {figures} · {run.seconds:.0f} s", flush=True)

    def _left(self) -> str:
        """The time that the other runs will take, at the mean of those that have ended."""
        ahead = self.total - len(self.runs)
        if ahead <= 0:
            return ""
        mean = sum(run.seconds for run in self.runs) / len(self.runs)
        return f", about {rough_duration(mean * ahead / min(self.at_once, self.total))} left"

    def closing(self) -> str:
        """The table of all runs, why runs failed and where their logs are, and the command that compares the runs."""
        runs = sorted(self.runs, key=lambda run: run.number)
        keys = list(dict.fromkeys(word.partition("=")[0] for run in runs for word in run.varied))
        rows = []
        for run in runs:
            values = dict(word.split("=", 1) for word in run.varied if "=" in word)
            figures = [round2(run.average), round2(run.bwt)] if run.error is None else ["failed", ""]
            rows.append([*(values.get(key, "") for key in keys), *figures, f"{run.seconds:.0f}"])
        lines = ["", table([*keys, "average", "bwt", "seconds"], rows)]
        lines += [f"failed {run.name}: {run.error}; log {run.out / 'train.log'}" for run in runs if run.error]
        if sum(run.error is None for run in runs) > 1:
            lines += ["", f"compare  {self._compare_command(keys)}"]
        return "\n".join(lines)

    def _compare_command(self, keys: Sequence[str]) -> str:
        compared = [key for key in keys if key.lstrip("+").split(".")[0] not in NOT_COMPARED] or ["method"]
        return f"clpet runs {shlex.quote(self.output_dir)} --compare {shlex.quote(','.join(compared))}"

    def print_once(self, record: logging.LogRecord) -> bool:
        """A filter of log messages: a warning that all runs of a sweep repeat is printed once."""
        return self.is_new(record.getMessage())

    def is_new(self, warning: str) -> bool:
        """Whether a warning has not been printed yet."""
        with self.lock:
            new = warning not in self.warnings
            self.warnings.add(warning)
        return new


def rough_duration(seconds: float) -> str:
    """Seconds as 40 s, 14 min or 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def expand_sweep(arguments: Sequence[str]) -> tuple[int, set[str]]:
    """The number of runs that Hydra's basic sweeper makes of the words of a command line, and the options that vary."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides([word for word in arguments if "=" in word and word[0] != "-"])
    keys = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    return sum(map(len, BasicSweeper.split_arguments(overrides, None))), keys
