"""Paired tests between groups of finished runs: a bootstrap over test examples and seeds, corrected after Holm (1979).

The bootstrap is paired: both methods answer the same test examples, so each resample draws the same examples for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpet.errors import DataError
from clpet.reporting.run_groups import Runs, same_tests
from clpet.runtime.untrusted_json import as_data_error

if TYPE_CHECKING:
    import pyarrow

NUM_DRAWS = 2000  # bootstrap resamples
MIN_SEEDS = 3  # number of seeds from which on seeds are resampled as well
Scores = dict[int, dict[str, np.ndarray]]  # {seed: {task: [test examples] scores in [0, 1]}}


@dataclass(frozen=True)
class Difference:
    """A difference in percent with its 95 % interval, two-sided p-value, and the number of paired seeds."""

    value: float
    low: float
    high: float
    p: float
    seeds: int


def difference(a: Runs, b: Runs, task_incremental: bool = False) -> Difference | str:
    """a minus b in final average score on the same test sets, or the reason why they cannot be tested."""
    if len({frozenset(run["tasks"]) for _, run in (*a, *b)}) > 1:
        return "their task lists differ"
    left, right = ({run["seed"]: (path, run) for path, run in group} for group in (a, b))
    common = sorted(left.keys() & right.keys())
    if not common:
        return "they have no seed in common"
    comparable = [seed for seed in common if same_tests(left[seed][1], right[seed][1])]
    if not comparable:
        return "their test sets differ"
    try:
        first, second = (final_scores([runs[seed] for seed in comparable], task_incremental) for runs in (left, right))
    except DataError as error:
        return str(error)
    seeds = [seed for seed in comparable if seed in first and seed in second and _same_shape(first[seed], second[seed])]
    if not seeds:
        return "no scores of test examples were saved (evaluation.predictions; perplexities have none)"
    return paired_bootstrap({seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds})


def _same_shape(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[task].shape == b[task].shape and a[task].size for task in a)


def final_scores(runs: Runs, task_incremental: bool = False) -> Scores:
    """The scores after the last task, from the saved predictions; runs without any are left out."""
    scores = {run["seed"]: row_scores(path, len(run["tasks"]), run["tasks"], task_incremental) for path, run in runs}
    return {seed: tasks for seed, tasks in scores.items() if tasks}


def row_scores(run: Path, row: int, tasks: Sequence[str], task_incremental: bool = False) -> dict[str, np.ndarray]:
    """{task: [test examples] scores in [0, 1]} after `row` tasks; empty without them, as for perplexities.

    `task_incremental` reads the answers among each task's own labels. Raises DataError for a damaged file.
    """
    import pyarrow.parquet

    file = run / "predictions" / f"after-{row:03d}.parquet"
    if not file.is_file():
        return {}
    with as_data_error(f"{file} cannot be read"):
        table = pyarrow.parquet.read_table(file)
        if not {"score", "prediction", "label"} & {*table.column_names}:  # of perplexities no answer is recorded
            return {}
        task, score = np.array(table["task"].to_pylist()), _scores(table, task_incremental)
        return {name: score[task == name] for name in tasks}


def _scores(table: "pyarrow.Table", task_incremental: bool) -> np.ndarray:
    """[examples] in [0, 1]."""
    column = "own_score" if task_incremental else "score"
    if task_incremental and column not in table.column_names:  # classification stores the answer, which is right or not
        answers = table["own_prediction"].to_pylist()
        return np.array([a == b for a, b in zip(answers, table["label"].to_pylist(), strict=True)], float)
    return np.array(table[column].to_pylist(), dtype=float)


def paired_bootstrap(a: Scores, b: Scores, draws: int = NUM_DRAWS) -> Difference:
    """a minus b: mean over tasks of the mean over seeds and test examples. Both have the same seeds, tasks and tests.

    Each draw resamples the test examples within every task, the same ones for a, b and all seeds, and also the seeds
    if there are at least MIN_SEEDS. p = min(1, 2 min(P(draw <= 0), P(draw >= 0)) + 1 / draws).
    """
    seeds = sorted(a)
    gaps = [np.stack([a[seed][task] - b[seed][task] for seed in seeds]) for task in a[seeds[0]]]  # [seeds, examples]
    rng = np.random.default_rng(0)
    statistics = np.empty(draws)
    for draw in range(draws):
        drawn = rng.integers(len(seeds), size=len(seeds)) if len(seeds) >= MIN_SEEDS else np.arange(len(seeds))
        weights = np.bincount(drawn, minlength=len(seeds)) / len(seeds)
        means = [(weights @ gap)[rng.integers(gap.shape[1], size=gap.shape[1])].mean() for gap in gaps]
        statistics[draw] = np.mean(means)
    # Without rounding, equal scores that cancel out could leave 1e-17, which would count as a difference.
    statistics = statistics.round(12)
    low, high = 100 * np.quantile(statistics, [0.025, 0.975])
    tail = min((statistics <= 0).mean(), (statistics >= 0).mean())
    value = 100 * np.mean([gap.mean() for gap in gaps])
    # 1 / draws is added since a p-value of exactly 0 cannot be claimed from a finite number of draws.
    return Difference(float(value), float(low), float(high), float(min(1.0, 2 * tail + 1 / draws)), len(seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of tests (Holm, 1979), which bounds the chance of any false positive.

    The k-th smallest of n is multiplied by n - k + 1; a corrected value is never below that of a smaller p.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
