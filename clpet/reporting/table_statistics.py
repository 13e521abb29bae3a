"""Statistics of a table of results: paired differences, what seeds and orders of the tasks contribute, and ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clpet.reporting.run_metrics import MeanStd, t_probability, t_quantile

Scores = Mapping[tuple[int, int], float]  # {(order, seed): value}
Values = Sequence[float] | np.ndarray
Answers = Mapping[tuple[int, int], Mapping[str, np.ndarray]]  # {(order, seed): {task: [test examples] in [0, 1]}}


class Paired(NamedTuple):
    """A mean or mean difference over n runs with its 95 % interval (Student's t) and the p-value of the test against 0.

    Without an estimate of its error there is neither an interval nor a test.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.mean:+.2f}{interval}"


def paired_difference(a: Scores, b: Scores) -> Paired | None:
    """a minus b over the runs that both have; None if they have none in common."""
    differences = [a[key] - b[key] for key in sorted(a.keys() & b.keys())]
    return one_sample(differences) if differences else None


def one_sample(values: Sequence[float]) -> Paired:
    """The mean of values with its interval, and the two-sided test of whether it is 0."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Paired(mean, None, None, None, n)
    std = float(np.std(values, ddof=1))
    if std == 0:
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    low, high = MeanStd(mean, std, n).interval() or (mean, mean)
    return Paired(mean, low, high, t_probability(mean / std * math.sqrt(n), n - 1), n)


MOST_DEGREES = 200  # more change no digit that is shown


def over_examples(a: Answers, b: Answers | None = None) -> Paired | None:
    """The final average, or that of a minus that of b, in percent, with an error from test examples and from runs.

    Runs and test examples are crossed random effects. With g_rji the (difference of the) score of run r of R on
    example i of task j of T, g_ji its mean over r, and d_r the average of a run: variance =
    sum_j var_i(g_ji) / n_j / T² + var_r(d_r) / R, the second term only for several runs; degrees of freedom after
    Satterthwaite, rounded down. The interaction is in both terms, so the interval is rather too wide. None without
    common runs on the same tests.
    """
    b = {run: {task: np.zeros_like(values) for task, values in a[run].items()} for run in a} if b is None else b
    runs = sorted(a.keys() & b.keys())
    sizes = {
        tuple(sorted((task, len(values)) for task, values in side[run].items())) for side in (a, b) for run in runs
    }
    if len(sizes) != 1:
        return None
    gaps = [np.stack([100 * (a[run][task] - b[run][task]) for run in runs]) for task in a[runs[0]]]
    by_run = np.mean([gap.mean(1) for gap in gaps], axis=0)
    mean, tasks, n = float(by_run.mean()), len(gaps), len(runs)
    terms = [sum(float(gap.mean(0).var(ddof=1)) / gap.shape[1] for gap in gaps if gap.shape[1] > 1) / tasks**2]
    terms += [float(by_run.var(ddof=1)) / n] if n > 1 else []
    degrees = [sum(gap.shape[1] for gap in gaps) - tasks, n - 1]
    variance = sum(terms)
    if variance < 1e-18:
        return Paired(mean, mean, mean, 1.0 if abs(mean) < 1e-9 else 0.0, n)
    freedom = variance**2 / sum(term**2 / max(1, most) for term, most in zip(terms, degrees, strict=False))
    freedom = max(1, min(MOST_DEGREES, math.floor(freedom + 1e-9)))
    error = math.sqrt(variance)
    half = t_quantile(freedom, 0.975) * error
    return Paired(mean, mean - half, mean + half, t_probability(mean / error, freedom), n)


class Variances(NamedTuple):
    """Variance of a score from one order of the tasks to another, and from one seed to another within an order.

    That of the orders is an unbiased estimate, which chance may make negative.
    """

    orders: float
    seeds: float


def variances(scores: Scores) -> Variances | None:
    """One-way analysis of variance: seeds: mean variance within an order; orders: that of their means - seeds / n.

    None unless there are at least two orders with the same n >= 2 seeds.
    """
    orders = sorted({order for order, _ in scores})
    groups = [[scores[key] for key in sorted(scores) if key[0] == order] for order in orders]
    if len(groups) < 2 or len({len(group) for group in groups}) > 1 or len(groups[0]) < 2:
        return None
    seeds = float(np.mean([np.var(group, ddof=1) for group in groups]))
    return Variances(float(np.var([np.mean(group) for group in groups], ddof=1)) - seeds / len(groups[0]), seeds)


def root(variance: float) -> float:
    """The standard deviation; 0 for an estimate below 0."""
    return math.sqrt(max(0.0, variance))


def rank_correlation(a: Values, b: Values) -> float | None:
    """Spearman's correlation, which is Pearson's of the ranks; None if all values of a or of b are equal."""
    across, up = (rank - rank.mean() for rank in (ranks(a), ranks(b)))
    scale = math.sqrt((across @ across) * (up @ up))
    return float(across @ up) / scale if scale else None


def ranks(values: Values) -> np.ndarray:
    """[n]: 1 for the smallest; equal values have the mean of their ranks."""
    ordered = np.sort(values)
    first, last = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (first + last + 1) / 2
