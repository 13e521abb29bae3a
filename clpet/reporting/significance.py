"""Paired tests between groups of finished runs: a bootstrap over test examples and seeds, corrected after Holm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clpet.errors import DataError
from clpet.reporting.run_groups import Group, same_tests
from clpet.runtime.untrusted_json import readable

DRAWS = 2000  # bootstrap resamples
SAMPLED = 3  # seeds that it takes to resample them
Scores = dict[int, dict[str, np.ndarray]]  # seed -> task -> score from 0 to 1 per test example


@dataclass(frozen=True)
class Difference:
    """A difference in percent with its 95 % interval, a two-sided p, and the number of seeds it is paired over."""

    value: float
    low: float
    high: float
    p: float
    seeds: int


def difference(a: Group, b: Group, own: bool = False) -> Difference | str:
    """a minus b in final average score on equal test sets, or the reason why they cannot be tested."""
    if len({frozenset(run["tasks"]) for _, run in (*a, *b)}) > 1:
        return "their task lists differ"
    left, right = ({run["seed"]: (path, run) for path, run in group} for group in (a, b))
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return "they have no seed in common"
    equal = [seed for seed in seeds if same_tests(left[seed][1], right[seed][1])]
    if not equal:
        return "their test sets differ"
    try:
        first, second = (final_scores([runs[seed] for seed in equal], own) for runs in (left, right))
    except DataError as error:
        return str(error)
    kept = [seed for seed in equal if seed in first and seed in second and _same_shape(first[seed], second[seed])]
    if not kept:
        return "their predictions were not kept (evaluation.predictions)"
    return paired_bootstrap({seed: first[seed] for seed in kept}, {seed: second[seed] for seed in kept})


def _same_shape(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[task].shape == b[task].shape and a[task].size for task in a)


def final_scores(group: Group, own: bool = False) -> Scores:
    """How right each test example is after the last task, read from the kept predictions.

    `own` reads the task-incremental view. Raises DataError, which names the file, where one is damaged.
    """
    import pyarrow.parquet

    found: Scores = {}
    for path, run in group:
        file = path / "predictions" / f"after-{len(run['tasks']):03d}.parquet"
        if not file.is_file():
            continue
        with readable(f"{file} cannot be read"):
            table = pyarrow.parquet.read_table(file)
            task, score = np.array(table["task"].to_pylist()), _scores(table, own)
            found[run["seed"]] = {name: score[task == name] for name in run["tasks"]}
    return found


def _scores(table: Any, own: bool) -> np.ndarray:
    name = "own_score" if own else "score"
    if own and name not in table.column_names:  # of labels it follows from what was answered
        answers = table["own_prediction"].to_pylist()
        return np.array([a == b for a, b in zip(answers, table["label"].to_pylist(), strict=True)], float)
    return np.array(table[name].to_pylist(), dtype=float)


def paired_bootstrap(a: Scores, b: Scores, draws: int = DRAWS) -> Difference:
    """a minus b, mean over tasks of the mean over seeds and test examples; both have the same seeds, tasks and tests.

    Each draw resamples the test examples inside every task, the same ones for a, b and all seeds, and, where there
    are at least SAMPLED, the seeds. p = min(1, 2 min(P(draw <= 0), P(draw >= 0)) + 1 / draws).
    """
    seeds = sorted(a)
    parts = [np.stack([a[seed][task] - b[seed][task] for seed in seeds]) for task in a[seeds[0]]]  # [seeds, examples]
    rng = np.random.default_rng(0)
    statistics = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(len(seeds), size=len(seeds)) if len(seeds) >= SAMPLED else np.arange(len(seeds))
        weights = np.bincount(chosen, minlength=len(seeds)) / len(seeds)
        means = [(weights @ part)[rng.integers(part.shape[1], size=part.shape[1])].mean() for part in parts]
        statistics[draw] = np.mean(means)
    statistics = statistics.round(12)  # what cancels out is 0
    low, high = 100 * np.quantile(statistics, [0.025, 0.975])
    tail = min((statistics <= 0).mean(), (statistics >= 0).mean())
    value = 100 * np.mean([part.mean() for part in parts])
    return Difference(float(value), float(low), float(high), float(min(1.0, 2 * tail + 1 / draws)), len(seeds))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected for their number (Holm, 1979): they bound the chance of any false claim."""
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = worst
    return corrected
