"""Elements shared by all figures: the canvas, fonts, the cell frame, names that fit on an axis, and saving."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpet.escape import inline

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

# Per script the names of common fonts, of which the first installed one is used.
FALLBACK_FONTS = (
    ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
     "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei"),
    ("Noto Sans CJK KR", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic"),
    ("Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI"),
    ("Noto Sans Arabic", "Noto Naskh Arabic"),
)  # fmt: skip


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` inches with its axes."""
    figure, (axes,) = new_panels(width, height, 1)
    return figure, axes


def new_panels(width: float, height: float, columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure of `width` x `height` inches with one axes per column."""
    figure, (panels,) = new_grid(width, height, 1, columns)
    return figure, panels


def new_grid(width: float, height: float, lines: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    """A figure of `width` x `height` inches with `lines` x `columns` axes."""
    # The Agg canvas is attached by hand instead of through pyplot: it needs no display and keeps no global list of
    # open figures, which would hold every figure of a long process in memory.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a task may be called "$x": print dollar signs as they are
    matplotlib.rcParams["font.family"] = font_families()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(line) for line in figure.subplots(nrows=lines, ncols=columns, squeeze=False)]


@cache
def font_families() -> list[str]:
    """Matplotlib's own font, and an installed font for each script that it lacks, for the names of tasks and labels."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    chosen = [next((name for name in names if name in installed), None) for names in FALLBACK_FONTS]
    return ["DejaVu Sans", *filter(None, chosen)]


def frame(x: float, y: float, colour: str = "crimson", width: float = 2) -> "Rectangle":
    """A border around the heat map cell whose upper left corner is (x, y)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width)


def save(figure: "Figure", path: Path) -> Path:
    """Writes the figure in the format of the path's ending and returns the path."""
    # "tight": a title may be wider than the axes. Without a date, equal figures are equal files.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
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
