"""Metrics of continual domain-adaptive pretraining (Yıldız et al., 2024, arXiv 2402.17400), from perplexities alone.

P[i, j] is the perplexity on domain j after training on domain i, row 0 that of the base model; N domains. Lower is
better in every metric: a difference (`minus`) below 0 or a ratio (`over`) below 1 is a gain. Backward transfer compares
with the zero-shot model, as the paper does; `minus_own` compares with the checkpoint just after the domain. Averages
weight all domains equally; a metric whose entries were not measured is None.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from clpet.records import (
    Curve,
    Curves,
    CurveValues,
    DomainRow,
    Metrics,
    PartOfDomains,
    PerplexityTransfer,
)

FORMULAS = {
    "zs": "mean_j P[0,j]: zero-shot",
    "dapt": "mean_j D_j, D_j = perplexity on domain j of the model trained on it alone (method=dapt)",
    "cpt": "mean_j P[j,j]: each domain just after it was learned",
    "lc": "mean_j P[N,j]: the last checkpoint",
    "fg": "mean_j (P[N,j] - P[j,j]); above 0: forgotten",
    "fg_before_last": "mean_{j<N} (P[N,j] - P[j,j]): the last domain cannot be forgotten yet",
    "cpt_minus_dapt": "mean_j (P[j,j] - D_j); below 0: earlier domains helped",
    "lc_minus_dapt": "mean_j (P[N,j] - D_j)",
    "backward": "mean_{i>1} mean_{j<i} (P[i,j] - P[0,j]); below 0: better on old domains than zero-shot",
    "forward": "mean_{i<N} mean_{j>i} (P[i,j] - P[0,j]); below 0: better on later domains than zero-shot",
    "bwt": "mean_{j<N} (P[N,j] - P[j,j]), the usual BWT on perplexities",
    "fwt": "mean_{j>1} (P[j-1,j] - P[0,j])",
    "bwt_log": "mean_{j<N} (log P[N,j] - log P[j,j])",
    "fwt_log": "mean_{j>1} (log P[j-1,j] - log P[0,j])",
}
COLUMNS = ("zs", "dapt", "cpt", "lc", "fg", "backward", "forward")  # of a comparison, by default
DAPT = "dapt"  # the method whose diagonal is D
SATURATION_TOLERANCE = 0.02  # largest relative distance from the median at which a transfer curve counts as saturated

Axis = Literal["after", "age", "lead"]
Entries = Callable[[np.ndarray, int], np.ndarray]  # (matrix, position) -> the entries of the matrix at the position
Values = np.ndarray | Sequence[float | None]


def figures(
    scores: np.ndarray,
    names: Sequence[str],
    dapt: np.ndarray | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> PerplexityTransfer:
    """Every metric as plain values. `scores` [N+1, N] and `dapt` [N] are NaN where not measured.

    `groups` names sets of domains that are also reported separately, from their columns of the same matrix.
    """
    scores = np.asarray(scores, dtype=float)
    single = np.full(len(names), np.nan) if dapt is None else np.asarray(dapt, dtype=float)
    columns = {
        group: [j for j, name in enumerate(names) if name in members] for group, members in (groups or {}).items()
    }
    with np.errstate(invalid="ignore"):  # the difference of two infinite perplexities is undefined
        return {
            "direction": "lower is better",
            "domains": _domains(scores, names, single),
            **_over_columns(scores, single, list(range(len(names)))),
            "groups": {
                group: {"domains": [names[j] for j in members], **_over_columns(scores, single, members)}
                for group, members in columns.items()
                if members
            },
        }


def headline(metrics: PerplexityTransfer) -> Metrics:
    """The means that FORMULAS describes, by name, selected from `metrics`."""
    means = {name: average["mean"] for name, average in metrics["average"].items()}
    curves = {"backward": metrics["backward"], "forward": metrics["forward"]}
    pairs = {name: _mean(curve["minus_zs"]["mean"]) for name, curve in curves.items()}
    return {name: {**means, **pairs, **metrics["classic"]}[name] for name in FORMULAS}


def _domains(scores: np.ndarray, names: Sequence[str], dapt: np.ndarray) -> list[DomainRow]:
    learned, last = own_checkpoint(scores), scores[-1]
    forgotten = last - learned
    return [
        {
            "domain": name,
            "zs": _plain(scores[0, j]),
            "dapt": _plain(dapt[j]),
            "cpt": _plain(learned[j]),
            "lc": _plain(last[j]),
            "fg": _plain(forgotten[j]),
        }
        for j, name in enumerate(names)
    ]


def _over_columns(scores: np.ndarray, dapt: np.ndarray, columns: list[int]) -> PartOfDomains:
    """The metrics over some columns; positions in time remain those of the full order."""
    learned = own_checkpoint(scores)
    masked = np.full(scores.shape, np.nan)
    masked[:, columns] = scores[:, columns]
    old = [j for j in columns if j < len(learned) - 1]
    later = [j for j in columns if j > 0]
    average = {
        "zs": scores[0, columns],
        "dapt": dapt[columns],
        "cpt": learned[columns],
        "lc": scores[-1, columns],
        "fg": (scores[-1] - learned)[columns],
        "fg_before_last": (scores[-1] - learned)[old],
        "cpt_minus_zs": (learned - scores[0])[columns],
        "lc_minus_zs": (scores[-1] - scores[0])[columns],
        "cpt_minus_dapt": (learned - dapt)[columns],
        "lc_minus_dapt": (scores[-1] - dapt)[columns],
    }
    classic = {}
    for suffix, values in (("", scores), ("_log", np.log(scores))):
        before = np.diagonal(values)  # P[j-1, j]
        classic[f"bwt{suffix}"] = _mean((values[-1] - own_checkpoint(values))[old])
        classic[f"fwt{suffix}"] = _mean((before - values[0])[later])
    curves = transfer(masked)
    return {
        "average": {name: {"mean": _mean(values), "median": _median(values)} for name, values in average.items()},
        "classic": classic,
        **curves,
        "saturation": {
            name: {"mean": saturation(curve, "mean"), "median": saturation(curve, "median")}
            for name, curve in (("backward", curves["backward"]), ("forward", curves["forward"]))
        },
    }


def transfer(scores: np.ndarray) -> Curves:
    """Backward B_i and forward F_i by position i, backward transfer by age and forward transfer by lead.

    Age a: checkpoint i on domain i - a, trained a domains ago; lead l: checkpoint i on domain i + l, not trained yet.
    Each has four views: the perplexity, minus and over the zero-shot perplexity, and minus that of the checkpoint just
    after the domain; mean and median over the measured entries, whose number is `count`.
    """
    size = scores.shape[1]
    views = {
        "perplexity": scores,
        "minus_zs": scores - scores[0],
        "over_zs": scores / scores[0],
        "minus_own": scores - own_checkpoint(scores),
    }
    return {
        "backward": _curve("after", range(2, size + 1), views, lambda p, i: p[i, : i - 1]),
        "by_age": _curve("age", range(size), views, lambda p, age: np.diagonal(p[1:], -age)),
        "forward": _curve("after", range(1, size), views, lambda p, i: p[i, i:]),
        "by_lead": _curve("lead", range(1, size), views, lambda p, lead: np.diagonal(p[1:], lead)),
    }


def _curve(axis: Axis, points: range, views: dict[str, np.ndarray], entries: Entries) -> Curve:
    def over_points(name: str) -> CurveValues:
        samples = [_measured(entries(views[name], point)) for point in points]
        return {"mean": [_mean(sample) for sample in samples], "median": [_median(sample) for sample in samples]}

    curve: Curve = {
        "count": [int(_measured(entries(views["perplexity"], point)).size) for point in points],
        "perplexity": over_points("perplexity"),
        "minus_zs": over_points("minus_zs"),
        "over_zs": over_points("over_zs"),
        "minus_own": over_points("minus_own"),
    }
    curve[axis] = list(points)
    return curve


def saturation(
    curve: Curve, kind: Literal["mean", "median"] = "mean", epsilon: float = SATURATION_TOLERANCE
) -> int | None:
    """The first position from which a transfer curve (over the zero-shot perplexity) stays near its median.

    Near means within a relative distance `epsilon` of the median over all positions; None if the last one is not.
    """
    points = [
        (at, value) for at, value in zip(curve["after"], curve["over_zs"][kind], strict=True) if value is not None
    ]
    if not points:
        return None
    level = float(np.median([value for _, value in points]))
    first = None
    for at, value in reversed(points):
        if abs(value - level) > epsilon * abs(level):
            break
        first = at
    return first


def own_checkpoint(scores: np.ndarray) -> np.ndarray:
    """[N]: P[j,j], the perplexity on each domain just after training on it."""
    diagonal: np.ndarray = np.diagonal(scores[1:])
    return diagonal


def _measured(values: np.ndarray) -> np.ndarray:
    measured: np.ndarray = values[~np.isnan(values)]
    return measured


def _mean(values: Values) -> float | None:
    array = np.asarray(values, dtype=float)
    return _plain(array.mean()) if array.size else None


def _median(values: Values) -> float | None:
    array = np.asarray(values, dtype=float)
    return _plain(np.median(array)) if array.size else None


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
