"""Pictures of a run: the transfer matrix as a heat map, accuracy over time as curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clpet.escape import inline
from clpet.metrics.transfer_matrix import TransferMatrix


def transfer_heatmap(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Rows are training time from top to bottom, columns are tasks; a frame marks the task just learned."""
    names = [short(name) for name in matrix.tasks]
    wide, high = room(names)
    figure, axes = new_figure(1.6 + wide + 0.75 * len(matrix), 1.5 + high + 0.5 * (len(matrix) + 1))
    scores = matrix.scores
    image = axes.imshow(np.ma.masked_invalid(scores), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(scores):
        if value == value:
            colour = "black" if value > 50 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    for index in range(len(matrix)):
        axes.add_patch(frame(index - 0.5, index + 0.5))
    axes.set_xticks(range(len(matrix)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(matrix) + 1), ["before", *names])
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="score, %")
    return save(figure, path)


def accuracy_curves(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Each task's score from the moment it is learned, and the average over the tasks seen so far."""
    figure, axes = new_figure(7, 4.2)
    steps = np.arange(1, len(matrix) + 1)
    for index, name in enumerate(matrix.tasks):
        axes.plot(steps[index:], matrix.scores[index + 1 :, index], marker="o", markersize=4, label=short(name))
    average = [matrix.average(row, row) for row in range(1, len(matrix) + 1)]
    values = [np.nan if value is None else value for value in average]
    axes.plot(steps, values, color="black", linewidth=2.5, label="average of seen")
    axes.set_xticks(steps)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("score, %")
    axes.set_ylim(0, 102)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def retrieval_heatmap(shares: np.ndarray, tasks: list[str], path: Path, title: str) -> Path:
    """Rows are the texts' tasks, columns the task that most retrieved keys belong to.

    shares [tasks, tasks + 1]; the last column is no majority.
    """
    tasks = [short(name) for name in tasks]
    wide, high = room(tasks)
    figure, axes = new_figure(2.4 + wide + 0.75 * len(tasks), 1.5 + high + 0.5 * len(tasks))
    image = axes.imshow(np.ma.masked_invalid(100 * shares), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(100 * shares):
        if value == value:
            colour = "black" if value > 50 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    for index in range(len(tasks)):
        axes.add_patch(frame(index - 0.5, index - 0.5))
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "none"], rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("majority of retrieved keys")
    axes.set_ylabel("task of the text")
    axes.set_title(f"{title}: retrieval", fontsize=11)
    figure.colorbar(image, ax=axes, label="texts, %")
    return save(figure, path)


def importance_heatmap(history: list[dict[str, Any]], tasks: list[str], path: Path, title: str) -> Path:
    """One row per layer, one block of columns per task with a column per unit of the layer (rank); `history` holds
    each task's importance in [0, 1] by layer. The colours' square root shows more of a scale on which most is near 0.
    """
    from matplotlib.colors import PowerNorm

    layers = list(history[0])
    width = max(len(history[0][layer]) for layer in layers)
    values = np.full((len(layers), len(tasks) * width), np.nan)
    for place, entry in enumerate(history):
        for row, layer in enumerate(layers):
            values[row, place * width : place * width + len(entry[layer])] = np.asarray(entry[layer])
    shown = list(range(0, len(layers), -(-len(layers) // 40)))
    figure, axes = new_figure(3 + max(4.0, 0.05 * values.shape[1]), 1.6 + 0.17 * len(shown))
    image = axes.imshow(values, norm=PowerNorm(0.5, 0, 1), cmap="magma", aspect="auto", interpolation="nearest")
    for place in range(1, len(tasks)):
        axes.axvline(place * width - 0.5, color="white", linewidth=1)
    axes.set_xticks(
        [(place + 0.5) * width - 0.5 for place in range(len(tasks))],
        [short(name) for name in tasks],
        rotation=30,
        ha="right",
    )
    names = short_names(layers)
    axes.set_yticks(shown, [names[row] for row in shown], fontsize=7)
    axes.set_xlabel(f"task learned ({width} units of a layer side by side)" if width > 1 else "task learned")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="importance, least to most of the task")
    return save(figure, path)


def share_bars(figures: list[dict[str, float]], tasks: list[str], path: Path, title: str) -> Path:
    """Stacked bars: percent of the units kept, shared, taken and averaged in the fusion after each task."""
    figure, axes = new_figure(2.5 + 0.7 * len(tasks), 4)
    foot = np.zeros(len(tasks))
    for part, colour in (("kept", "#4c72b0"), ("shared", "#8172b3"), ("taken", "#dd8452"), ("averaged", "#d0d0d0")):
        height = np.array([entry[f"units_{part}"] for entry in figures])
        axes.bar(range(len(tasks)), height, bottom=foot, color=colour, label=part)
        foot += height
    axes.set_xticks(range(len(tasks)), [short(name) for name in tasks], rotation=30, ha="right")
    axes.set_ylabel("units, %")
    axes.set_xlabel("after learning")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def short_names(names: list[str]) -> list[str]:
    """Dotted names without the parts that all of them have."""
    split = [name.split(".") for name in names]
    common = set(split[0]).intersection(*split) if len(names) > 1 else set()
    return [".".join(part for part in parts if part not in common) for parts in split]


def short(name: str, most: int = 24) -> str:
    """A task's name as it fits next to a picture."""
    name = inline(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def room(names: Sequence[str]) -> tuple[float, float]:
    """(width, height) in inches that names longer than ten letters need beside and, slanted, below a picture."""
    longest = max(0, *(len(name) - 10 for name in names))
    return 0.075 * longest, 0.04 * longest


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure in inches with its axes, or one axes per column; no display is needed. A dollar sign is one."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(ncols=columns)


def frame(x: float, y: float, colour: str = "crimson", width: float = 2) -> Any:
    """The border of the cell whose corner is (x, y)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width)


def save(figure: Any, path: Path) -> Path:
    """Writes the picture and gives its path."""
    figure.savefig(path, dpi=110, bbox_inches="tight")  # a title may be wider than the axes
    return path
