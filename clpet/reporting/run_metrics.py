"""Metrics of finished runs: of one run, including those that need reference runs, and mean and deviation over seeds."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Metrics, PerplexityTransfer, Results
from clpet.reporting.run_groups import Runs, fingerprint
from clpet.runtime.untrusted_json import read_results, split_of


class MeanStd(NamedTuple):
    """Mean and sample standard deviation (n - 1 degrees of freedom) of a metric over n seeds; std is None if n = 1."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Student's t interval of the mean over seeds: mean ± t(n - 1) * std / sqrt(n); None for one seed."""
        if self.std is None:
            return None
        half = t_quantile(self.n - 1, (1 + level) / 2) * self.std / self.n**0.5
        return self.mean - half, self.mean + half


@functools.cache  # a table has the same number of seeds in most rows
def t_quantile(degrees: int, p: float) -> float:
    """The quantile p > 1/2 of Student's t, by Newton's method from that of the normal distribution, which is smaller.

    With mpmath, on which torch depends, because scipy would take 140 MB for this number.
    """
    share, t = 2 * (1 - p), NormalDist().inv_cdf(p)
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    for _ in range(100):
        density = math.exp(scale - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (t_probability(t, degrees) - share) / (2 * density)
        t += step
        if abs(step) < 1e-13 * t:
            break
    return t


def t_probability(t: float, degrees: int) -> float:
    """P(|T| > |t|) = I_x(degrees / 2, 1/2) of Student's t with x = degrees / (degrees + t²)."""
    import mpmath  # not needed to list or show runs

    x = mpmath.mpf(degrees) / (degrees + mpmath.mpf(t) ** 2)
    return float(mpmath.betainc(mpmath.mpf(degrees) / 2, 0.5, 0, x, regularized=True))


def mean_and_std(values: Sequence[float | None]) -> MeanStd | None:
    """Mean and standard deviation over seeds; None if a seed lacks the value, so that no mean hides missing runs."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return MeanStd(float(np.mean(numbers)), std, len(numbers))


def matrix_of(run: Results, task_incremental: bool = False) -> TransferMatrix:
    """The transfer matrix in results.json: of all seen labels, or of each task's own labels (task-incremental view)."""
    if not task_incremental:
        return TransferMatrix.from_json(run)
    matrix = TransferMatrix.from_json(run, run["task_scores"])
    matrix.correct = matrix.scores * matrix.total / 100  # results.json counts correct answers among all labels only
    return matrix


def run_metrics(run: Results, runs: Runs, task_incremental: bool = False) -> Metrics:
    """{metric: value} of a run. Metrics relative to a joint or independent run take it from `runs`, else are None."""
    matrix = matrix_of(run, task_incremental)
    references = {name: reference(run, runs, name, task_incremental) for name in ("independent", "joint")}
    metrics = matrix.metrics(**references)
    if matrix.direction == "lower":
        metrics |= perplexity_transfer.headline(pretraining_metrics(run, runs))
    return metrics


def validation_average(run: Results, task_incremental: bool = False) -> float | None:
    """The final average on validation, for choosing settings; None if it was not measured."""
    if split_of(run) != "test":
        return matrix_of(run, task_incremental).average()
    return (run.get("validation") or {}).get("own_average" if task_incremental else "average")


def outcome(out: Path) -> float | None:
    """The objective value that a sweep reports for a finished run: its final average on validation, else on test."""
    run = read_results(out / "results.json")
    validation = validation_average(run)
    return TransferMatrix.from_json(run).average() if validation is None else validation


def pretraining_metrics(run: Results, runs: Runs) -> PerplexityTransfer:
    """`perplexity_transfer.figures` of a run; DAPT is the diagonal of a dapt run of the same setting, data and seed."""
    matrix, dapt = TransferMatrix.from_json(run), None
    if dapt_matrix := reference(run, runs, perplexity_transfer.DAPT):
        diagonal = perplexity_transfer.own_checkpoint(dapt_matrix.scores)
        by_domain = dict(zip(dapt_matrix.tasks, diagonal, strict=True))
        dapt = np.array([by_domain.get(name, np.nan) for name in matrix.tasks])
    groups = {name: group["domains"] for name, group in run["pretraining"]["groups"].items()}
    return perplexity_transfer.figures(matrix.scores, matrix.tasks, dapt, groups)


def reference(run: Results, runs: Runs, method: str, task_incremental: bool = False) -> TransferMatrix | None:
    """The matrix of the `method` run with the same setting, data and seed as `run`; None if there is none.

    The setting is a hash of the config without the method and its options, so all methods of a sweep share one.
    """
    key = (method, run["setting"], run["seed"], fingerprint(run))
    for _, other in runs:
        if (other["method"], other["setting"], other["seed"], fingerprint(other)) == key:
            return matrix_of(other, task_incremental)
    return None
