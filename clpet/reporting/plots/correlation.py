"""The picture of `clpet runs --correlate`: a named point per row."""

from collections.abc import Mapping
from pathlib import Path

from clpet.reporting.plots.canvas import new_figure, save, short

WIDE = 30.0  # ratio of the largest to the smallest value from which on an axis is logarithmic


def scatter(points: Mapping[str, tuple[float, float]], names: tuple[str, str], title: str, path: Path) -> Path:
    """Draws the rows as points of two figures. The format is the one that the path's ending names."""
    figure, axes = new_figure(8.5, 6)
    across, up = zip(*points.values(), strict=True)
    axes.scatter(across, up, s=24)
    for name, point in points.items():
        axes.annotate(short(name), point, xytext=(4, 3), textcoords="offset points", fontsize=8)
    scales = ["log" if min(values) > 0 and max(values) / min(values) > WIDE else "linear" for values in (across, up)]
    axes.set(xlabel=names[0], ylabel=names[1], xscale=scales[0], yscale=scales[1])
    axes.set_title(title, fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    return save(figure, path)
