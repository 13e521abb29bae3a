"""Figures of a run of accuracies or scores: the transfer matrix as a heat map, and scores over time as curves."""

from pathlib import Path

import numpy as np

from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.reporting.plots.canvas import frame, margins, new_figure, save, short, write_percentages


def transfer_heatmap(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Rows are training time from top to bottom, columns are tasks; a frame marks the task just learned."""
    names = [short(name) for name in matrix.tasks]
    width, height = margins(names)
    figure, axes = new_figure(1.6 + width + 0.75 * len(matrix), 1.5 + height + 0.5 * (len(matrix) + 1))
    image = axes.imshow(np.ma.masked_invalid(matrix.scores), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    write_percentages(axes, matrix.scores)
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
