"""Reads the losses of a run's steps.jsonl, thinned for a chart."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from clpet.runtime.json_lines import parse_lines

STEP_LOG = "steps.jsonl"
MAX_POINTS = 150  # per run


class Loss(NamedTuple):
    """The loss of a training step, or the mean of neighbouring steps; step counts from the start of the run."""

    step: int
    loss: float
    task: str
    stage: str


def mean_losses(run: Path) -> list[Loss]:
    """About MAX_POINTS means over neighbouring steps of the same stage; empty for a run without a step log.

    Lines without a step and a finite loss, such as those of validation or a line cut off by a full disk, are left out.
    """
    file = run / STEP_LOG
    if not file.is_file():
        return []
    lines = [_loss(line) for _, line in parse_lines(file.read_text("utf-8", errors="replace"))]
    losses = [loss for loss in lines if loss]
    width = -(-len(losses) // MAX_POINTS)  # steps per point, rounded up
    points = []
    for stage in dict.fromkeys(loss.stage for loss in losses):
        steps = [loss for loss in losses if loss.stage == stage]
        for start in range(0, len(steps), width):
            group = steps[start : start + width]
            points.append(group[-1]._replace(loss=float(np.mean([loss.loss for loss in group]))))
    return points


def _loss(line: object) -> Loss | None:
    if not isinstance(line, dict):
        return None
    step, loss = line.get("step"), line.get("loss")
    if not isinstance(step, int) or not isinstance(loss, int | float) or not np.isfinite(loss):
        return None
    return Loss(step, float(loss), str(line.get("task_name", "-")), str(line.get("stage", "")))
