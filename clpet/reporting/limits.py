"""`clpet check`: whether a finished run stays within limits on forgetting and on its average."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clpet.errors import ConfigError, DataError
from clpet.escape import inline
from clpet.metrics.transfer_matrix import TransferMatrix, on_split
from clpet.records import Results
from clpet.reporting.run_groups import same_tests
from clpet.reporting.significance import paired_bootstrap, row_scores
from clpet.reporting.tables import spell_score
from clpet.runtime.untrusted_json import read_results, split_of

TOLERANCE = 1e-9  # points; differences of percentages are not exact


@dataclass(frozen=True)
class Limits:
    """The largest drop of a task, and the smallest final average; None: no limit.

    Drops are points of a score, or for perplexities a rise in percent.
    """

    max_drop: float | None = None
    min_average: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ConfigError(f"--max-drop must be at least 0, not {self.max_drop:g}")
        if self.min_average is not None and not 0 <= self.min_average <= 100:
            raise ConfigError(f"--min-average is in percent, from 0 to 100, not {self.min_average:g}")


@dataclass(frozen=True)
class Measured:
    """A run and its matrix: among all labels seen so far, or among each task's own labels."""

    path: Path
    results: Results
    task_incremental: bool

    @classmethod
    def read(cls, path: Path, task_incremental: bool) -> "Measured":
        """Raises DataError unless `path` is the directory of a finished run."""
        if not (path / "results.json").is_file():
            raise DataError(f"{path} is not the directory of a finished run: it has no results.json")
        return cls(path, read_results(path / "results.json"), task_incremental)

    @property
    def matrix(self) -> TransferMatrix:
        """The scores that are checked."""
        return TransferMatrix.from_json(self.results, self.results["task_scores"] if self.task_incremental else None)

    def scores(self, row: int, task: str) -> np.ndarray:
        """[test examples] in [0, 1] of a task after `row` tasks; empty if the predictions were not saved."""
        return row_scores(self.path, row, self.results["tasks"], self.task_incremental).get(task, np.empty(0))


def check_limits(path: Path, limits: Limits, against: Path | None, task_incremental: bool) -> tuple[str, bool]:
    """(one line per limit that is not met, or one line that all are; whether all are).

    The drop of a task is its score right after it was learned minus its final score; with `against` it is the final
    score of that run minus the final score of this one. Raises DataError if nothing can be compared.
    """
    run = Measured.read(path, task_incremental)
    if run.matrix.direction == "lower" and limits.min_average is not None:
        raise ConfigError("--min-average is for scores in percent; for perplexities use --max-drop (a rise in percent)")
    drops = Drops(run, None if against is None else Measured.read(against, task_incremental))
    failures: list[str] = []
    notes: list[str] = []
    if limits.max_drop is not None:
        failures, notes = drops.above(limits.max_drop)
    if limits.min_average is not None:
        failures += _low_average(run, limits.min_average)
    head = f"{run.results['method']} on {on_split(run.results['benchmark'], split_of(run.results))}"
    lines = failures or [f"passed: {inline(head)}, {drops.summary(limits)}"]
    return "\n".join([*lines, *notes]), not failures


class Drops:
    """The drop of every task of a run, from just after learning it or from another run."""

    def __init__(self, run: Measured, other: Measured | None) -> None:
        self.run, self.other, self.last = run, other, len(run.matrix)
        self.lower = run.matrix.direction == "lower"
        tasks = run.results["tasks"]
        if other:
            if not same_tests(run.results, other.results):
                raise DataError(f"{run.path} and {other.path} were not measured on the same test examples")
            tasks = [task for task in tasks if task in other.results["tasks"]]
        self.values = {task: drop for task in tasks if (drop := self._drop(task)) is not None}

    def _reference(self, task: str) -> tuple[Measured, int]:
        """The run and row with which the final score of a task is compared."""
        if self.other:
            return self.other, len(self.other.matrix)
        return self.run, self.run.results["tasks"].index(task) + 1

    def _score(self, run: Measured, row: int, task: str) -> float:
        return float(run.matrix.scores[row, run.results["tasks"].index(task)])

    def _drop(self, task: str) -> float | None:
        """In points, or as a rise in percent; None if one of the two scores was not measured."""
        before, now = self._score(*self._reference(task), task), self._score(self.run, self.last, task)
        drop = 100 * (now / before - 1) if self.lower else before - now
        return None if np.isnan(drop) else drop

    def above(self, limit: float) -> tuple[list[str], list[str]]:
        """(one line per task whose drop is above the limit, a note on tasks without one). Raises DataError."""
        tasks = self.run.results["tasks"]
        if not self.values:
            raise DataError(
                f"{self.run.path} has no score from right after a task was learned next to its final one "
                "(evaluation.matrix, evaluation.every, or a method that learns all tasks at once): use --against RUN"
            )
        missing = [inline(task) for task in tasks if task not in self.values]
        notes = [f"note: not compared, since a score is missing: {', '.join(missing)}"] if missing else []
        return [self._line(task, limit) for task, drop in self.values.items() if drop > limit + TOLERANCE], notes

    def _line(self, task: str, limit: float) -> str:
        (reference, row), direction = self._reference(task), self.run.matrix.direction
        before = spell_score(self._score(reference, row, task), direction)
        now = spell_score(self._score(self.run, self.last, task), direction)
        verb, unit = ("rose by", " %") if self.lower else ("fell by", " points")
        source = f"{before} after task {row}"
        if self.other:
            verb, source = "is worse by", f"{before} in {reference.path}"
        return (
            f"{inline(task)} {verb} {self.values[task]:.2f}{unit}, more than {limit:g}: "
            f"{source}, {now} after task {self.last}{self._interval(task)}"
        )

    def _interval(self, task: str) -> str:
        """The 95 % interval of a drop over test examples, which are the same before and after."""
        reference, row = self._reference(task)
        before, now = reference.scores(row, task), self.run.scores(self.last, task)
        if self.lower or not before.size or before.shape != now.shape:
            return ""
        drop = paired_bootstrap({0: {task: before}}, {0: {task: now}})
        return f" (95 % interval of the drop {drop.low:.2f} to {drop.high:.2f})"

    def summary(self, limits: Limits) -> str:
        """The largest drop and the average, as far as they are limited."""
        parts = []
        if limits.max_drop is not None:
            task = max(self.values, key=lambda name: self.values[name])
            name = "rise" if self.lower else "drop"
            unit = " %" if self.lower else " points"
            parts.append(f"largest {name} {self.values[task]:.2f}{unit} ({inline(task)}), at most {limits.max_drop:g}")
        if limits.min_average is not None:
            parts.append(f"average {self.run.matrix.average():.2f}, at least {limits.min_average:g}")
        return "; ".join(parts)


def _low_average(run: Measured, limit: float) -> list[str]:
    """A line if the final average is below the limit. Raises DataError if it was not measured."""
    average = run.matrix.average()
    if average is None:
        raise DataError(f"{run.path} has no average: a task was not measured after the last one")
    if average >= limit - TOLERANCE:
        return []
    scores = row_scores(run.path, len(run.matrix), run.results["tasks"], run.task_incremental)
    interval = ""
    if scores and all(values.size for values in scores.values()):
        estimate = paired_bootstrap({0: scores}, {0: {task: np.zeros_like(values) for task, values in scores.items()}})
        interval = f" (95 % interval {estimate.low:.2f} to {estimate.high:.2f})"
    return [f"average {average:.2f} is below {limit:g}{interval}"]
