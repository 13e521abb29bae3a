"""The picture of a comparison of scores: one colour per row, with deviations over seeds, and the matrices below."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpet.reporting.plots.canvas import new_grid, save, short, write_percentages
from clpet.reporting.points import Point, cost_points, metric_points, seen_averages
from clpet.reporting.run_groups import Row, Section
from clpet.reporting.run_metrics import matrix_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 3  # at the top; matrices come below, as many in a line
MARKERS = "osD^v<>pP*X"


def compare_rows(section: Section, path: Path, title: str) -> Path:
    """Draws the rows of a section of scores: averages over time, forgetting, cost, and the mean matrix of every row.

    The format is the one that the path's ending names.
    """
    rows = [row for row in section.rows if row.runs]
    lines = 1 + math.ceil(len(rows) / PANELS)
    figure, grid = new_grid(4.6 * PANELS, 3.9 * lines, lines, PANELS)
    averages, scatter, cost = grid[0]
    _curves(averages, rows, seen_averages(section), section.metric)
    _dots(scatter, rows, metric_points(section, "learning_accuracy", "forgetting"), "learning accuracy", "forgetting")
    _dots(cost, rows, cost_points(section), "training seconds", f"average {section.metric} in %")
    cells = [axes for line in grid[1:] for axes in line]
    for row, axes in zip(rows, cells, strict=False):
        _matrix(axes, row)
    for axes in cells[len(rows) :]:
        axes.set_axis_off()
    handles, labels = averages.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(rows), 6), fontsize=9)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def _style(rows: Sequence[Row], name: str) -> dict[str, object]:
    """Colour and marker of a row, the same in every panel."""
    from matplotlib import colormaps

    index = [row.name for row in rows].index(name)
    palette = colormaps["tab10" if len(rows) <= 10 else "tab20"]
    return {"color": palette(index % palette.N), "marker": MARKERS[index % len(MARKERS)]}


def _curves(axes: "Axes", rows: Sequence[Row], points: Sequence[Point], metric: str) -> None:
    """The average of the tasks seen so far, with a band of one standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        curve = [point for point in points if point["row"] == row.name]
        x, y, low, high = ([point[key] for point in curve] for key in ("x", "y", "low", "high"))
        style = _style(rows, row.name)
        axes.plot(x, y, label=short(row.name, 40), markersize=4, **style)  # type: ignore[arg-type]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(f"average {metric} of seen tasks in %")
    axes.grid(alpha=0.3)


def _dots(axes: "Axes", rows: Sequence[Row], points: Sequence[Point], x: str, y: str) -> None:
    """A dot per row with bars of one standard deviation over seeds."""
    for point in points:
        across, up, left, low = (float(str(point[key])) for key in ("x", "y", "left", "low"))
        style = _style(rows, str(point["row"]))
        axes.errorbar(across, up, xerr=across - left, yerr=up - low, capsize=2, linestyle="", **style)  # type: ignore[arg-type]
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(0.12)
    axes.grid(alpha=0.3)


def _matrix(axes: "Axes", row: Row) -> None:
    """The transfer matrix of a row, mean over its seeds; a note instead if the seeds have other task orders."""
    matrices = [matrix_of(run) for _, run in row.runs]
    axes.set_title(short(row.name, 40), fontsize=10)
    if len({tuple(matrix.tasks) for matrix in matrices}) > 1:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "the runs have different task orders", ha="center", va="center", fontsize=9)
        return
    scores = np.mean([matrix.scores for matrix in matrices], axis=0)
    axes.imshow(np.ma.masked_invalid(scores), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    names = [short(name, 12) for name in matrices[0].tasks]
    if len(names) <= 12:
        write_percentages(axes, scores)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(names) + 1), ["before", *names], fontsize=7)
