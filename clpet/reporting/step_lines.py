"""The lines of a run's step log, steps.jsonl, and its losses thinned for a chart."""

from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from clpet.runtime.json_lines import parse_lines

STEP_LOG = "steps.jsonl"
MAX_POINTS = 150  # per run


class StepLine(TypedDict):
    """A line of steps.jsonl: of an optimiser step, or with `validation` of a validation after an epoch.

    Numbers that were not finite are None. Rates are means since the line before.
    """

    step: int  # optimiser steps of the run so far
    task: int  # position in the curriculum, from 1
    task_name: str
    stage: str  # name of the fit in a task; "" in a method with a single fit
    epoch: int  # from 1
    loss: NotRequired[float | None]  # of this step's batch
    lr: NotRequired[float]
    grad_norm: NotRequired[float | None]  # before clipping
    examples_per_s: NotRequired[float]
    tokens_per_s: NotRequired[float]  # without padding
    memory_gb: NotRequired[float]  # peak of the task on a GPU, of the process on a CPU; in 2**30 bytes
    validation: NotRequired[float]  # the score that train.select=best maximises


class Loss(NamedTuple):
    """The loss of a training step, or the mean of neighbouring steps; step counts from the start of the run."""

    step: int
    loss: float
    task: str
    stage: str


def read_steps(run: Path) -> list[StepLine]:
    """The lines of a run's step log in order, without invalid ones; an empty list if the file is missing."""
    file = run / STEP_LOG
    if not file.is_file():
        return []
    values = [value for _, value in parse_lines(file.read_text("utf-8", errors="replace"))]
    return [cast(StepLine, value) for value in values if isinstance(value, dict) and isinstance(value.get("step"), int)]


def mean_losses(run: Path) -> list[Loss]:
    """About MAX_POINTS means over neighbouring steps of the same stage; empty for a run without a step log.

    Lines without a finite loss, such as those of validation, are left out.
    """
    losses = [loss for line in read_steps(run) if (loss := _loss(line))]
    width = -(-len(losses) // MAX_POINTS)  # steps per point, rounded up
    points = []
    for stage in dict.fromkeys(loss.stage for loss in losses):
        steps = [loss for loss in losses if loss.stage == stage]
        for start in range(0, len(steps), width):
            group = steps[start : start + width]
            points.append(group[-1]._replace(loss=float(np.mean([loss.loss for loss in group]))))
    return points


def _loss(line: StepLine) -> Loss | None:
    loss = line.get("loss")
    if not isinstance(loss, int | float) or not np.isfinite(loss):
        return None
    return Loss(line["step"], float(loss), str(line.get("task_name", "-")), str(line.get("stage", "")))
