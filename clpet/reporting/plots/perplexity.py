"""Figures of continual pretraining: the perplexity matrix, domains by position, transfer by distance, groups of runs.

`transfer` is in every function what `perplexity_transfer.figures` returns of one run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from clpet.escape import inline
from clpet.metrics.perplexity_transfer import headline, own_checkpoint
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import OrderRecord, PerplexityTransfer
from clpet.reporting.plots.canvas import frame, new_figure, new_panels, save, short

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Kind = Literal["mean", "median"]
STYLES: dict[Kind, str] = {"mean": "-", "median": ":"}
MAX_NAMES = 24  # most domains whose names fit on an axis
MAX_NUMBERS = 16  # most domains whose perplexities fit into the cells of a matrix
COLOURS = {"zs": "#8c8c8c", "dapt": "#2ca02c", "cpt": "#1f77b4", "lc": "#d62728"}
MEANINGS = {"zs": "zero-shot", "dapt": "alone on the domain", "cpt": "just after it", "lc": "last checkpoint"}


def perplexity_heatmap(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Rows are training time, columns domains. Blue is better than zero-shot, red is worse: log2(P / P_zero-shot).

    If row 0 was not measured, colours are relative to each column's median instead.
    """
    size, scores = len(matrix), matrix.scores
    cell = 0.75 if size <= MAX_NUMBERS else 9 / size
    figure, axes = new_figure(3 + cell * size, 2 + (0.5 / 0.75) * cell * (size + 1))
    has_zero_shot = bool(np.isfinite(scores[0]).all())
    base = scores[0] if has_zero_shot else np.nanmedian(scores, axis=0)
    octaves = np.log2(scores / base)
    limit = max(0.1, float(np.nanmax(np.abs(octaves[np.isfinite(octaves)]), initial=0)))
    image = axes.imshow(np.ma.masked_invalid(octaves), vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto")
    if size <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(scores):
            if value == value:
                dark = abs(octaves[row, column]) > 0.6 * limit
                text = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for index in range(size):
        axes.add_patch(frame(index - 0.5, index + 0.5, "black", 1.5 if size <= MAX_NUMBERS else 0.6))
    _domain_axis(axes.xaxis, matrix.tasks, 0)
    _domain_axis(axes.yaxis, ["before", *matrix.tasks], 0 if size < MAX_NAMES else 1)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")
    axes.set_title(f"{title}: perplexity, framed just after its domain", fontsize=11)
    bar = figure.colorbar(image, ax=axes, label="perplexity / " + ("zero-shot" if has_zero_shot else "median"))
    ticks = np.linspace(-limit, limit, 5).tolist()
    bar.set_ticks(ticks, labels=[f"{2**tick:.2g}" for tick in ticks])
    return save(figure, path)


def _domain_axis(axis: "Axis", names: Sequence[str], start: int) -> None:
    """Sets one tick per domain name; if there are too many, every 10th or 20th with its number, from 1 - `start`."""
    from matplotlib.axis import XAxis

    if len(names) <= MAX_NAMES + 1:
        axis.set_tick_params(labelsize=8)
        labels = [short(name) for name in names]
        if isinstance(axis, XAxis):
            axis.set_ticks(range(len(names)), labels, rotation=30, ha="right")
        else:
            axis.set_ticks(range(len(names)), labels)
    else:
        step = 10 if len(names) <= 120 else 20
        ticks = [tick for tick in range(len(names)) if (tick + 1 - start) % step == 0]
        axis.set_ticks(ticks, [str(tick + 1 - start) for tick in ticks])


def by_position(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Each domain in training order: zero-shot, just after it was learned and at the end, on a log axis."""
    figure, axes = new_figure(max(7.0, min(14.0, 3 + 0.4 * len(matrix))), 4.6)
    positions = np.arange(len(matrix))
    rows = {"zs": matrix.scores[0], "cpt": own_checkpoint(matrix.scores), "lc": matrix.scores[-1]}
    size = 6 if len(matrix) <= MAX_NAMES else 3
    axes.vlines(positions, rows["cpt"], rows["lc"], color="#d0d0d0", linewidth=2, zorder=0)
    for key, values in rows.items():
        axes.plot(positions, values, "_" if key == "zs" else "o", markersize=size, color=COLOURS[key],
                  label=f"{key.upper()}: {MEANINGS[key]}", markeredgewidth=2 if key == "zs" else 0)  # fmt: skip
    _perplexity_axis(axes)
    _domain_axis(axes.xaxis, matrix.tasks, 0)
    axes.set_xlabel("domain, in training order")
    axes.set_title(f"{title}: learned and kept", fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def _perplexity_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.grid(axis="y", alpha=0.3)


def transfer_curves(transfer: PerplexityTransfer, path: Path, title: str) -> Path:
    """Left: transfer of each checkpoint to earlier and later domains. Right: transfer by distance in domains."""
    figure, (left, right) = new_panels(12, 4.4, columns=2)
    for curve, colour, words in (
        (transfer["backward"], "#1f77b4", "to earlier domains"),
        (transfer["forward"], "#ff7f0e", "to later domains"),
    ):
        for kind, style in STYLES.items():
            left.plot(curve["after"], _floats(curve["over_zs"][kind]), style, color=colour, label=f"{words}, {kind}",
                      marker="o" if len(curve["after"]) <= MAX_NAMES else None, markersize=4)  # fmt: skip
    left.set_xlabel("domains learned")
    left.set_title("transfer of each checkpoint", fontsize=10)
    for kind, style in STYLES.items():
        distance, values = by_distance(transfer, kind)
        right.plot(distance, values, style, color="black", label=kind,
                   marker="o" if len(distance) <= 2 * MAX_NAMES else None, markersize=4)  # fmt: skip
    right.axvline(0, color="crimson", linewidth=1)
    right.set_xlabel("domains learned since the tested domain (negative: before it)")
    right.set_title("transfer by distance", fontsize=10)
    _ratio_axes(left, right)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def by_distance(transfer: PerplexityTransfer, kind: Kind) -> tuple[list[int], np.ndarray]:
    """(distance, perplexity / zero-shot): lead as negative distances, far to near, then age."""
    lead, age = transfer["by_lead"], transfer["by_age"]
    distance = [*(-steps for steps in reversed(lead["lead"])), *age["age"]]
    return distance, np.array([*_floats(lead["over_zs"][kind])[::-1], *_floats(age["over_zs"][kind])])


def _ratio_axes(*panels: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.axhline(1, color="#8c8c8c", linewidth=1, linestyle="--", label="zero-shot")
        axes.set_ylabel("perplexity / zero-shot (lower is better)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def order_heatmap(order: OrderRecord, path: Path, title: str) -> Path:
    """Cosine similarities between domains in training order; if there is a reference text, it is the first column."""
    names, values = list(order["names"]), np.array(order["similarity"], dtype=float)
    reference = order.get("reference_similarity")
    cell = 0.6 if len(names) <= MAX_NUMBERS else 9 / len(names)
    side = 2.5 + cell * (len(names) + (reference is not None))
    figure, axes = new_figure(side + 1, side)
    off_diagonal = values[~np.eye(len(names), dtype=bool)]
    cells = values if reference is None else np.column_stack([reference, values])
    # The diagonal is 1 everywhere: the colour scale spans the other cells.
    low, high = (
        min(off_diagonal.min(initial=1), np.min(reference or 1)),
        max(off_diagonal.max(initial=0), np.max(reference or 0)),
    )
    image = axes.imshow(cells, vmin=low, vmax=high, cmap="magma", aspect="equal")
    if len(names) <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(cells):
            colour = "black" if value > (low + high) / 2 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    shift = 0 if reference is None else 1
    if reference is not None:
        axes.axvline(0.5, color="white", linewidth=3)
    for index in range(1, len(names)):  # frame the steps of the chain: from the previous domain to this one
        axes.add_patch(frame(index + shift - 0.5, index - 1.5, "#00c8c8", 1.5 if len(names) <= MAX_NUMBERS else 0.6))
    _domain_axis(axes.xaxis, [*(["reference"] if shift else []), *names], shift)
    _domain_axis(axes.yaxis, names, 0)
    axes.set_title(
        f"{title}: order {order['order']}\n(cosine of mean {order['encoder']} vectors, steps framed)", fontsize=10
    )
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)
    return save(figure, path)


def plot_groups(groups: Mapping[str, list[PerplexityTransfer]], key: str, path: Path, title: str) -> Path:
    """Compares groups of runs, such as one per model: mean perplexities as bars, and transfer by distance as curves.

    `groups` maps a name to the `transfer` of each of its seeds; `key` is the option that tells the groups apart.
    """
    figure, (left, right) = new_panels(12.5, 4.6, columns=2)
    _mean_bars(left, groups)
    left.set_xlabel(key)
    _distance_curves(right, groups)
    figure.suptitle(f"{title} by {key}", fontsize=11)
    return save(figure, path)


def _mean_bars(axes: "Axes", groups: Mapping[str, list[PerplexityTransfer]]) -> None:
    """Per group one bar each for zero-shot, DAPT, CPT and the last checkpoint, averaged over domains and seeds."""
    means = [[headline(transfer) for transfer in runs] for runs in groups.values()]
    columns = {
        column: _floats([_mean_over_seeds([averages[column] for averages in seeds]) for seeds in means])
        for column in COLOURS
    }
    columns = {column: values for column, values in columns.items() if not np.isnan(values).all()}
    positions, width = np.arange(len(groups)), 0.8 / len(columns)
    for index, (column, values) in enumerate(columns.items()):
        x = positions + (index - (len(columns) - 1) / 2) * width
        bars = axes.bar(x, values, width, color=COLOURS[column], label=f"{column.upper()}: {MEANINGS[column]}")
        axes.bar_label(bars, [("" if v != v else f"{v:.3g}") for v in values], fontsize=7)
    slanted = len(groups) > 3  # longer rows of names would overlap
    axes.set_xticks(
        positions,
        [inline(name) for name in groups],
        rotation=20 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.set_ylabel("mean perplexity over domains")
    axes.margins(y=0.15)
    axes.legend(fontsize=8, ncols=2)


def _distance_curves(axes: "Axes", groups: Mapping[str, list[PerplexityTransfer]]) -> None:
    """Per group one curve of perplexity / zero-shot by distance, averaged over seeds."""
    from matplotlib import colormaps

    for index, (name, runs) in enumerate(groups.items()):
        curves = [dict(zip(*by_distance(transfer, "mean"), strict=True)) for transfer in runs]
        distance = sorted(set().union(*curves))
        means = _floats([_mean_over_seeds([curve.get(x) for curve in curves]) for x in distance])
        axes.plot(distance, means, label=inline(name), color=colormaps["viridis"](index / len(groups)))
    axes.axvline(0, color="crimson", linewidth=1)
    axes.set_xlabel("domains learned since the tested domain (negative: before it)")
    _ratio_axes(axes)


def _mean_over_seeds(values: Sequence[float | None]) -> float | None:
    """The mean over seeds; None if a seed lacks the value."""
    finite = [value for value in values if value is not None and value == value]
    return float(np.mean(finite)) if finite and len(finite) == len(values) else None
