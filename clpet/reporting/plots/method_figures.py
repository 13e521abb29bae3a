"""Figures that single methods add to a run: retrieved keys (SLM), unit importance and its fusion (KIF)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clpet.records import Figures
from clpet.reporting.plots.canvas import frame, margins, new_figure, save, short, short_names, write_percentages


def draw(folder: Path, method: str, figures: Figures) -> list[Path]:
    """Draws what `Method.figures` returned, {kind: arguments of its function below}, as `folder`/<kind>.png."""
    kinds: dict[str, tuple[Callable[..., Path], str]] = {
        "retrieval": (retrieval_heatmap, "retrieval"),
        "importance": (importance_heatmap, "importance of units"),
        "fusion": (share_bars, "fusion of units"),
    }
    paths = []
    for kind, data in figures.items():
        plot, title = kinds[kind]
        paths.append(plot(**data, path=folder / f"{kind}.png", title=f"{method}: {title}"))
    return paths


def retrieval_heatmap(shares: np.ndarray, tasks: list[str], path: Path, title: str) -> Path:
    """Rows are the tasks of the test texts, columns the task that most of their retrieved keys belong to.

    shares [tasks, tasks + 1] in [0, 1]; the last column counts texts without a majority.
    """
    tasks = [short(name) for name in tasks]
    width, height = margins(tasks)
    figure, axes = new_figure(2.4 + width + 0.75 * len(tasks), 1.5 + height + 0.5 * len(tasks))
    image = axes.imshow(np.ma.masked_invalid(100 * shares), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    write_percentages(axes, 100 * shares)
    for index in range(len(tasks)):
        axes.add_patch(frame(index - 0.5, index - 0.5))
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "none"], rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("majority of retrieved keys")
    axes.set_ylabel("task of the text")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="texts, %")
    return save(figure, path)


def importance_heatmap(history: list[dict[str, Sequence[float]]], tasks: list[str], path: Path, title: str) -> Path:
    """One row per layer, one block of columns per task with a column per unit (rank) of the layer.

    `history` holds {layer: importance [units] in [0, 1]} of each task.
    """
    from matplotlib.colors import PowerNorm

    layers = list(history[0])
    width = max(len(history[0][layer]) for layer in layers)
    values = np.full((len(layers), len(tasks) * width), np.nan)
    for task, importance in enumerate(history):
        for row, layer in enumerate(layers):
            values[row, task * width : task * width + len(importance[layer])] = np.asarray(importance[layer])
    labelled = list(range(0, len(layers), -(-len(layers) // 40)))  # at most 40 layer names fit on the axis
    figure, axes = new_figure(3 + max(4.0, 0.05 * values.shape[1]), 1.6 + 0.17 * len(labelled))
    # Most values are near 0: a square-root colour scale separates them.
    image = axes.imshow(values, norm=PowerNorm(0.5, 0, 1), cmap="magma", aspect="auto", interpolation="nearest")
    for task in range(1, len(tasks)):
        axes.axvline(task * width - 0.5, color="white", linewidth=1)
    centres = [(task + 0.5) * width - 0.5 for task in range(len(tasks))]
    axes.set_xticks(centres, [short(name) for name in tasks], rotation=30, ha="right")
    names = short_names(layers)
    axes.set_yticks(labelled, [names[row] for row in labelled], fontsize=7)
    axes.set_xlabel(f"task learned ({width} units of a layer side by side)" if width > 1 else "task learned")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="importance, least to most of the task")
    return save(figure, path)


def share_bars(percentages: list[dict[str, float]], tasks: list[str], path: Path, title: str) -> Path:
    """Stacked bars: percent of the units kept, shared, taken and averaged in the fusion after each task."""
    figure, axes = new_figure(2.5 + 0.7 * len(tasks), 4)
    bottom = np.zeros(len(tasks))
    for share, colour in (("kept", "#4c72b0"), ("shared", "#8172b3"), ("taken", "#dd8452"), ("averaged", "#d0d0d0")):
        height = np.array([percent[f"units_{share}"] for percent in percentages])
        axes.bar(range(len(tasks)), height, bottom=bottom, color=colour, label=share)
        bottom += height
    axes.set_xticks(range(len(tasks)), [short(name) for name in tasks], rotation=30, ha="right")
    axes.set_ylabel("units, %")
    axes.set_xlabel("after learning")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)
