"""The figure of default against tuned: a line per row of a table from one average to the other."""

from collections.abc import Sequence
from pathlib import Path

from clpet.reporting.plots.canvas import new_figure, save, short
from clpet.reporting.run_metrics import MeanStd


def tuning_figure(
    rows: Sequence[tuple[str, MeanStd, MeanStd]], path: Path, title: str, score: str = "final average"
) -> Path:
    """Draws (row, default, tuned) with the first row at the top; thin bars are standard deviations over seeds.

    The format is the one that the path's ending names. Equal rows give equal files.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = path.stem  # else every file has other ids
    figure, axes = new_figure(7.5, 1.4 + 0.24 * len(rows))
    heights = [len(rows) - index for index in range(len(rows))]
    defaults, tuned = [row[1] for row in rows], [row[2] for row in rows]
    axes.hlines(
        heights, [mean.mean for mean in defaults], [mean.mean for mean in tuned],
        color="silver", linewidth=2, zorder=1,
    )  # fmt: skip
    for label, means, colour, face in (
        ("default", defaults, "dimgray", "white"),
        ("tuned", tuned, "tab:blue", "tab:blue"),
    ):
        axes.errorbar(
            [mean.mean for mean in means], heights, xerr=[mean.std or 0.0 for mean in means], fmt="o", markersize=5,
            color=colour, markerfacecolor=face, elinewidth=0.8, label=label,
        )  # fmt: skip
    axes.set_yticks(heights, [short(row[0], 40) for row in rows], fontsize=8)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_xlabel(f"{score}, first order of the tasks")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)
