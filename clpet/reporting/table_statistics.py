"""Statistics of a table of results: paired differences, what seeds and orders of the tasks contribute, and ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clpet.reporting.run_metrics import MeanStd, t_probability

Scores = Mapping[tuple[int, int], float]  # {(order, seed): value}


class Paired(NamedTuple):
    """The mean of n differences with its 95 % interval (Student's t) and the p-value of the paired t-test.

    With a single pair there is neither an interval nor a test.
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


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's correlation: that of the ranks, where equal values share the mean of theirs; None if all are equal."""
    ranks = [np.array([(np.sum(np.less(x, y)) + np.sum(np.less_equal(x, y)) + 1) / 2 for y in x]) for x in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks) or len(a) < 2:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
