"""Reads the losses of a run's steps.jsonl, thinned for a chart."""

from pathlib import Path

import numpy as np

from clpet.runtime.json_lines import parse_lines

STEP_LOG = "steps.jsonl"
MAX_POINTS = 150  # per run


def mean_losses(run: Path) -> list[tuple[int, float, str]]:
    """(step, mean loss, task) of at most MAX_POINTS groups of neighbouring steps; empty for a run without a step log.

    Lines without a step and a finite loss, such as those of validation or a line cut off by a full disk, are left out.
    """
    file = run / STEP_LOG
    if not file.is_file():
        return []
    steps: list[int] = []
    losses: list[float] = []
    tasks: list[str] = []
    for _, line in parse_lines(file.read_text("utf-8", errors="replace")):
        if isinstance(line, dict):
            step, loss = line.get("step"), line.get("loss")
            if isinstance(step, int) and isinstance(loss, int | float) and np.isfinite(loss):
                steps.append(step)
                losses.append(float(loss))
                tasks.append(str(line.get("task_name", line.get("task", "-"))))
    if not steps:
        return []
    groups = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    return [(steps[group[-1]], float(np.mean([losses[i] for i in group])), tasks[group[-1]]) for group in groups]
