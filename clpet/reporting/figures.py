"""Figures of finished runs: of one run, with what they need of reference runs, and their spread over seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.reporting.run_groups import Group, fingerprint
from clpet.runtime.untrusted_json import read_results, split_of


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) of a figure over n seeds; no deviation of a single one."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of a figure; None unless every seed has it."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def matrix_of(run: dict[str, Any], own: bool = False) -> TransferMatrix:
    """A run's matrix, all seen labels competing, or in the view of each task's own labels."""
    if not own:
        return TransferMatrix.from_json(run)
    matrix = TransferMatrix.from_json({**run, "scores": run["task_scores"]})
    matrix.correct = matrix.scores * matrix.total / 100
    return matrix


def figures(run: dict[str, Any], runs: Group, own: bool = False) -> dict[str, float | None]:
    """Every convention of a run, those that need a joint or independent run taken from `runs` where it is there."""
    matrix = matrix_of(run, own)
    found = matrix.metrics(**{name: reference(run, runs, name, own) for name in ("independent", "joint")})
    if matrix.direction == "lower":
        found |= perplexity_transfer.headline(pretraining_figures(run, runs))
    return found


def validation_average(run: dict[str, Any], own: bool = False) -> float | None:
    """The final average on validation, by which settings are chosen; None where it was not measured."""
    if split_of(run) != "test":
        return matrix_of(run, own).average()
    return (run.get("validation") or {}).get("own_average" if own else "average")


def outcome(out: Path) -> float | None:
    """What a sweep is told of a finished run: its final average on validation where there is one, else that on test."""
    run = read_results(out / "results.json")
    chosen = validation_average(run)
    return TransferMatrix.from_json(run).average() if chosen is None else chosen


def pretraining_figures(run: dict[str, Any], runs: Group) -> dict[str, Any]:
    """The figures of a run of perplexities, with DAPT from the diagonal of a dapt run of the same setting and seed."""
    matrix, alone = TransferMatrix.from_json(run), None
    if found := reference(run, runs, perplexity_transfer.DAPT):
        known = dict(zip(found.tasks, perplexity_transfer.own_checkpoint(found.scores), strict=True))
        alone = np.array([known.get(name, np.nan) for name in matrix.tasks])
    groups = {name: part["domains"] for name, part in run["pretraining"]["groups"].items()}
    return perplexity_transfer.figures(matrix.scores, matrix.tasks, alone, groups)


def reference(run: dict[str, Any], runs: Group, method: str, own: bool = False) -> TransferMatrix | None:
    """The matrix of the reference run of the same setting, data and seed: any method of a sweep finds the same one."""
    wanted = (method, run["setting"], run["seed"], fingerprint(run))
    for _, other in runs:
        if (other["method"], other["setting"], other["seed"], fingerprint(other)) == wanted:
            return matrix_of(other, own)
    return None
