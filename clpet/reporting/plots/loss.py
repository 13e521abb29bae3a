"""The figure of a run's step log: the loss over its steps, with tasks shaded in turn and validation scores."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.reporting.plots.canvas import new_figure, save, short
from clpet.reporting.step_lines import StepLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAMED = 12  # most tasks whose names fit above the curve


def loss_curve(lines: Sequence[StepLine], path: Path, title: str) -> Path:
    """The loss at every recorded step, a colour per stage; points on the right axis are scores on validation."""
    figure, axes = new_figure(8, 4.2)
    _shade_tasks(axes, lines)
    colours: dict[str, str] = {}
    for (_, stage), group in groupby(lines, key=lambda line: (line["task"], line["stage"])):
        points = [(line["step"], loss) for line in group if (loss := line.get("loss")) is not None]
        label = None if stage in colours else stage or "loss"
        colour = colours.setdefault(stage, f"C{len(colours)}")
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, color=colour, label=label, marker=".", markersize=3)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_title(title, fontsize=11, pad=18)
    axes.grid(alpha=0.3)
    if scores := [(line["step"], line["validation"]) for line in lines if "validation" in line]:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), "k^", markersize=5)
        right.set_ylabel("▲ score on validation")
    if len(colours) > 1:
        axes.legend(fontsize=8)
    return save(figure, path)


def _shade_tasks(axes: "Axes", lines: Sequence[StepLine]) -> None:
    """Shades every second task, and names the tasks above the axes where their names fit."""
    ends = {line["task"]: line["step"] for line in lines}  # the last step of every task, in order
    names = {line["task"]: line["task_name"] for line in lines}
    start = 0
    for number, (task, end) in enumerate(ends.items()):
        if number % 2 == 0:
            axes.axvspan(start, end, color="0.93", zorder=0)
        if len(ends) <= MAX_NAMED:
            position = ((start + end) / 2, 1.01)
            name = short(names[task], 70 // len(ends))
            axes.text(*position, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        start = end
    axes.set_xlim(0, start)
