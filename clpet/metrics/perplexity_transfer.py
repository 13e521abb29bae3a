"""Figures of continual domain-adaptive pretraining (Yıldız et al., 2024, arXiv 2402.17400), from perplexities alone.

P[i, j] is the perplexity on domain j after domain i, row 0 that of the untrained-on model; N domains. Lower is
better in every figure: what is `minus` something is negative and what is `over` it below 1 where something was
gained. Backward transfer compares with the zero-shot model, as the paper does, `minus_own` with the domain's own
checkpoint. Averages are over domains, each counting the same; a figure whose entries were not measured is None.
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
    "cpt_minus_dapt": "mean_j (P[j,j] - D_j); below 0: the domains before helped",
    "lc_minus_dapt": "mean_j (P[N,j] - D_j)",
    "backward": "mean_{i>1} mean_{j<i} (P[i,j] - P[0,j]); below 0: better on old domains than zero-shot",
    "forward": "mean_{i<N} mean_{j>i} (P[i,j] - P[0,j]); below 0: better on domains to come than zero-shot",
    "bwt": "mean_{j<N} (P[N,j] - P[j,j]), the classic figure on perplexities",
    "fwt": "mean_{j>1} (P[j-1,j] - P[0,j])",
    "bwt_log": "mean_{j<N} (log P[N,j] - log P[j,j])",
    "fwt_log": "mean_{j>1} (log P[j-1,j] - log P[0,j])",
}
COLUMNS = ("zs", "dapt", "cpt", "lc", "fg", "backward", "forward")  # of a comparison, by default
DAPT = "dapt"  # the method whose diagonal is D
SETTLED = 0.02  # how far from its median, relatively, a transfer curve may still be when it has saturated

Axis = Literal["after", "age", "lead"]
Entries = Callable[[np.ndarray, int], np.ndarray]  # (matrix, position) -> the entries of the matrix at the position
Values = np.ndarray | Sequence[float | None]


def figures(
    scores: np.ndarray,
    names: Sequence[str],
    dapt: np.ndarray | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> PerplexityTransfer:
    """Every figure as plain values. `scores` [N+1, N] and `dapt` [N] are NaN where not measured.

    `groups` name sets of domains that are also reported apart: their columns of the same matrix.
    """
    scores = np.asarray(scores, dtype=float)
    alone = np.full(len(names), np.nan) if dapt is None else np.asarray(dapt, dtype=float)
    columns = {group: [j for j, name in enumerate(names) if name in own] for group, own in (groups or {}).items()}
    with np.errstate(invalid="ignore"):  # the difference of two infinite perplexities is not known
        return {
            "direction": "lower is better",
            "domains": _domains(scores, names, alone),
            **_part(scores, alone, list(range(len(names)))),
            "groups": {
                group: {"domains": [names[j] for j in own], **_part(scores, alone, own)}
                for group, own in columns.items()
                if own
            },
        }


def headline(found: PerplexityTransfer) -> Metrics:
    """The means that FORMULAS describes, by name, out of `figures`."""
    means = {name: average["mean"] for name, average in found["average"].items()}
    curves = {"backward": found["backward"], "forward": found["forward"]}
    pairs = {name: _mean(curve["minus_zs"]["mean"]) for name, curve in curves.items()}
    return {name: {**means, **pairs, **found["classic"]}[name] for name in FORMULAS}


def _domains(scores: np.ndarray, names: Sequence[str], dapt: np.ndarray) -> list[DomainRow]:
    own, last = own_checkpoint(scores), scores[-1]
    forgotten = last - own
    return [
        {
            "domain": name,
            "zs": _plain(scores[0, j]),
            "dapt": _plain(dapt[j]),
            "cpt": _plain(own[j]),
            "lc": _plain(last[j]),
            "fg": _plain(forgotten[j]),
        }
        for j, name in enumerate(names)
    ]


def _part(scores: np.ndarray, dapt: np.ndarray, columns: list[int]) -> PartOfDomains:
    """The figures over some columns; positions in time stay those of the whole order."""
    own = own_checkpoint(scores)
    inside = np.full(scores.shape, np.nan)
    inside[:, columns] = scores[:, columns]
    old = [j for j in columns if j < len(own) - 1]
    later = [j for j in columns if j > 0]
    average = {
        "zs": scores[0, columns],
        "dapt": dapt[columns],
        "cpt": own[columns],
        "lc": scores[-1, columns],
        "fg": (scores[-1] - own)[columns],
        "fg_before_last": (scores[-1] - own)[old],
        "cpt_minus_zs": (own - scores[0])[columns],
        "lc_minus_zs": (scores[-1] - scores[0])[columns],
        "cpt_minus_dapt": (own - dapt)[columns],
        "lc_minus_dapt": (scores[-1] - dapt)[columns],
    }
    classic = {}
    for suffix, values in (("", scores), ("_log", np.log(scores))):
        before = np.diagonal(values)  # P[j-1, j]
        classic[f"bwt{suffix}"] = _mean((values[-1] - own_checkpoint(values))[old])
        classic[f"fwt{suffix}"] = _mean((before - values[0])[later])
    curves = transfer(inside)
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
    """Backward B_i and forward F_i by position i, backward by age and forward by lead.

    Age a: domains trained since domain i - a was, seen from checkpoint i; lead l: domain i + l, not trained yet.
    Each in four views: the perplexity, minus and over the zero-shot one, minus that of the domain's own checkpoint;
    mean and median over the measured entries, whose number is `count`.
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


def _curve(axis: Axis, places: range, views: dict[str, np.ndarray], entries: Entries) -> Curve:
    def over_places(name: str) -> CurveValues:
        parts = [_measured(entries(views[name], place)) for place in places]
        return {"mean": [_mean(part) for part in parts], "median": [_median(part) for part in parts]}

    found: Curve = {
        "count": [int(_measured(entries(views["perplexity"], place)).size) for place in places],
        "perplexity": over_places("perplexity"),
        "minus_zs": over_places("minus_zs"),
        "over_zs": over_places("over_zs"),
        "minus_own": over_places("minus_own"),
    }
    found[axis] = list(places)
    return found


def saturation(curve: Curve, kind: Literal["mean", "median"] = "mean", epsilon: float = SETTLED) -> int | None:
    """The first position from which a transfer curve, over the zero-shot perplexity, stays near its median.

    Near is within a share `epsilon` of the median over all positions; None where even the last one is not.
    """
    places = [
        (at, value) for at, value in zip(curve["after"], curve["over_zs"][kind], strict=True) if value is not None
    ]
    if not places:
        return None
    level = float(np.median([value for _, value in places]))
    settled = None
    for at, value in reversed(places):
        if abs(value - level) > epsilon * abs(level):
            break
        settled = at
    return settled


def own_checkpoint(scores: np.ndarray) -> np.ndarray:
    """[N]: P[j,j], each domain just after it was learned."""
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
