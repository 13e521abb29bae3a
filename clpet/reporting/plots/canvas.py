"""Elements shared by all figures: the canvas, the cell frame, names that fit on an axis, and saving as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpet.escape import inline

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` inches with its axes."""
    figure, (axes,) = new_panels(width, height, 1)
    return figure, axes


def new_panels(width: float, height: float, columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure of `width` x `height` inches with one axes per column."""
    # The Agg canvas is attached by hand instead of through pyplot: it needs no display and keeps no global list of
    # open figures, which would hold every figure of a long process in memory.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a task may be called "$x": print dollar signs as they are
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(ncols=columns, squeeze=False)[0])


def frame(x: float, y: float, colour: str = "crimson", width: float = 2) -> "Rectangle":
    """A border around the heat map cell whose upper left corner is (x, y)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width)


def save(figure: "Figure", path: Path) -> Path:
    """Writes the figure as PNG and returns its path."""
    figure.savefig(path, dpi=110, bbox_inches="tight")  # "tight": a title may be wider than the axes
    return path


def short(name: str, max_length: int = 24) -> str:
    """A task name cut to `max_length` characters, without control characters."""
    name = inline(name)
    return name if len(name) <= max_length else f"{name[: max_length - 1]}…"


def short_names(names: list[str]) -> list[str]:
    """Dotted module names without the components that all of them share."""
    split = [name.split(".") for name in names]
    common = set(split[0]).intersection(*split) if len(names) > 1 else set()
    return [".".join(component for component in components if component not in common) for components in split]


def margins(names: Sequence[str]) -> tuple[float, float]:
    """(width, height) in inches to add for tick labels of more than ten letters: at the left, and slanted below."""
    excess = max(0, *(len(name) - 10 for name in names))
    return 0.075 * excess, 0.04 * excess


def write_percentages(axes: "Axes", percentages: np.ndarray) -> None:
    """Writes each number of a heat map (0 to 100, viridis) into its cell; NaN cells stay empty."""
    for (row, column), value in np.ndenumerate(percentages):
        if value == value:
            colour = "black" if value > 50 else "white"  # readable on the light and the dark end of viridis
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
