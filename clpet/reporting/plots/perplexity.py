"""Pictures of continual pretraining: perplexities over zero-shot, domains by position, transfer by distance, models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clpet.escape import inline
from clpet.metrics.perplexity_transfer import figures, headline, own_checkpoint
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.reporting.plots.matrix import frame, new_figure, save, short

NAMED = 24  # domains whose names fit on an axis
NUMBERED = 16  # domains whose perplexities fit into the cells of a matrix
COLOURS = {"zs": "#8c8c8c", "dapt": "#2ca02c", "cpt": "#1f77b4", "lc": "#d62728"}
WORDS = {"zs": "zero-shot", "dapt": "alone on the domain", "cpt": "just after it", "lc": "last checkpoint"}


def draw(out: Path, matrix: TransferMatrix, order: Mapping[str, Any] | None, title: str) -> list[Path]:
    """All pictures of one run that its matrix gives, and of the order where it came from similarities."""
    found = figures(matrix.scores, matrix.tasks)
    drawn = [
        perplexity_heatmap(matrix, out / "transfer.png", title),
        by_position(matrix, out / "domains.png", title),
        transfer_curves(found, out / "transfer_curves.png", title),
    ]
    if order and order.get("similarity"):
        drawn.append(order_heatmap(order, out / "order.png", title))
    return drawn


def perplexity_heatmap(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Rows are training time, columns domains; blue is better than zero-shot, red worse, in octaves of perplexity.

    Where row 0 was not measured, colours are relative to each column's median.
    """
    size, scores = len(matrix), matrix.scores
    cell = 0.75 if size <= NUMBERED else 9 / size
    figure, axes = new_figure(3 + cell * size, 2 + (0.5 / 0.75) * cell * (size + 1))
    known = bool(np.isfinite(scores[0]).all())
    base = scores[0] if known else np.nanmedian(scores, axis=0)
    octaves = np.log2(scores / base)
    most = max(0.1, float(np.nanmax(np.abs(octaves[np.isfinite(octaves)]), initial=0)))
    image = axes.imshow(np.ma.masked_invalid(octaves), vmin=-most, vmax=most, cmap="RdBu_r", aspect="auto")
    if size <= NUMBERED:
        for (row, column), value in np.ndenumerate(scores):
            if value == value:
                dark = abs(octaves[row, column]) > 0.6 * most
                text = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for index in range(size):
        axes.add_patch(frame(index - 0.5, index + 0.5, "black", 1.5 if size <= NUMBERED else 0.6))
    _domain_axis(axes.xaxis, matrix.tasks, 0)
    _domain_axis(axes.yaxis, ["before", *matrix.tasks], 0 if size < NAMED else 1)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")
    axes.set_title(f"{title}: perplexity, framed just after its domain", fontsize=11)
    bar = figure.colorbar(image, ax=axes, label="perplexity / " + ("zero-shot" if known else "median"))
    ticks = np.linspace(-most, most, 5)
    bar.set_ticks(ticks, labels=[f"{2**tick:.2g}" for tick in ticks])
    return save(figure, path)


def _domain_axis(axis: Any, names: Sequence[str], start: int) -> None:
    """Names where they fit, else positions."""
    if len(names) <= NAMED + 1:
        turned = {"rotation": 30, "ha": "right"} if axis.axis_name == "x" else {}
        axis.axes.tick_params(axis=axis.axis_name, labelsize=8)
        axis.set_ticks(range(len(names)), [short(name) for name in names], **turned)
    else:
        step = 10 if len(names) <= 120 else 20
        places = [place for place in range(len(names)) if (place + 1 - start) % step == 0]
        axis.set_ticks(places, [str(place + 1 - start) for place in places])


def by_position(matrix: TransferMatrix, path: Path, title: str) -> Path:
    """Each domain in training order: zero-shot, just after it was learned and at the end, on a log axis."""
    figure, axes = new_figure(max(7.0, min(14.0, 3 + 0.4 * len(matrix))), 4.6)
    places = np.arange(len(matrix))
    rows = {"zs": matrix.scores[0], "cpt": own_checkpoint(matrix.scores), "lc": matrix.scores[-1]}
    size = 6 if len(matrix) <= NAMED else 3
    axes.vlines(places, rows["cpt"], rows["lc"], color="#d0d0d0", linewidth=2, zorder=0)
    for key, values in rows.items():
        axes.plot(places, values, "_" if key == "zs" else "o", markersize=size, color=COLOURS[key],
                  label=f"{key.upper()}: {WORDS[key]}", markeredgewidth=2 if key == "zs" else 0)  # fmt: skip
    _perplexity_axis(axes)
    _domain_axis(axes.xaxis, matrix.tasks, 0)
    axes.set_xlabel("domain, in training order")
    axes.set_title(f"{title}: learned and kept", fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def _perplexity_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.grid(axis="y", alpha=0.3)


def transfer_curves(found: dict[str, Any], path: Path, title: str) -> Path:
    """Left: transfer of each checkpoint to old and to coming domains. Right: by distance from a domain's own turn."""
    figure, (left, right) = new_figure(12, 4.4, columns=2)
    for name, colour, words in (
        ("backward", "#1f77b4", "to domains before"),
        ("forward", "#ff7f0e", "to domains after"),
    ):
        curve = found[name]
        for kind, style in (("mean", "-"), ("median", ":")):
            left.plot(curve["after"], _floats(curve["over_zs"][kind]), style, color=colour, label=f"{words}, {kind}",
                      marker="o" if len(curve["after"]) <= NAMED else None, markersize=4)  # fmt: skip
    left.set_xlabel("domains learned")
    left.set_title("transfer of each checkpoint", fontsize=10)
    for kind, style in (("mean", "-"), ("median", ":")):
        distance, values = by_distance(found, kind)
        right.plot(distance, values, style, color="black", label=kind,
                   marker="o" if len(distance) <= 2 * NAMED else None, markersize=4)  # fmt: skip
    right.axvline(0, color="crimson", linewidth=1)
    right.set_xlabel("domains learned since the tested domain (below 0: until its turn)")
    right.set_title("transfer by distance", fontsize=10)
    _ratio_axes(left, right)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def by_distance(found: dict[str, Any], kind: str) -> tuple[list[int], np.ndarray]:
    """Perplexity over zero-shot by lead (as negative distances, far to near) and then by age."""
    lead, age = found["by_lead"], found["by_age"]
    distance = [*(-place for place in reversed(lead["lead"])), *age["age"]]
    return distance, np.array([*_floats(lead["over_zs"][kind])[::-1], *_floats(age["over_zs"][kind])])


def _ratio_axes(*panels: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.axhline(1, color="#8c8c8c", linewidth=1, linestyle="--", label="zero-shot")
        axes.set_ylabel("perplexity / zero-shot (lower is better)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def order_heatmap(order: Mapping[str, Any], path: Path, title: str) -> Path:
    """Cosines between domains in training order; the first column, where it is there, is the reference."""
    names, values = list(order["names"]), np.array(order["similarity"], dtype=float)
    near = order.get("reference_similarity")
    cell = 0.6 if len(names) <= NUMBERED else 9 / len(names)
    side = 2.5 + cell * (len(names) + (near is not None))
    figure, axes = new_figure(side + 1, side)
    off = values[~np.eye(len(names), dtype=bool)]
    shown = values if near is None else np.column_stack([near, values])
    low, high = min(off.min(initial=1), np.min(near or 1)), max(off.max(initial=0), np.max(near or 0))
    image = axes.imshow(shown, vmin=low, vmax=high, cmap="magma", aspect="equal")
    if len(names) <= NUMBERED:
        for (row, column), value in np.ndenumerate(shown):
            colour = "black" if value > (low + high) / 2 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    shift = 0 if near is None else 1
    if near is not None:
        axes.axvline(0.5, color="white", linewidth=3)
    for place in range(1, len(names)):  # the step of the chain: from the domain before to this one
        axes.add_patch(frame(place + shift - 0.5, place - 1.5, "#00c8c8", 1.5 if len(names) <= NUMBERED else 0.6))
    _domain_axis(axes.xaxis, [*(["reference"] if shift else []), *names], shift)
    _domain_axis(axes.yaxis, names, 0)
    axes.set_title(
        f"{title}: order {order['order']}\n(cosine of mean {order['encoder']} vectors, steps framed)", fontsize=10
    )
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)
    return save(figure, path)


def side_by_side(groups: Mapping[str, list[dict[str, Any]]], key: str, path: Path, title: str) -> Path:
    """Groups of runs (models, methods, orders): their means over domains, and transfer by distance, mean over seeds."""
    from matplotlib import colormaps

    figure, (left, right) = new_figure(12.5, 4.6, columns=2)
    places = np.arange(len(groups))
    means = {name: [headline(found) for found in runs] for name, runs in groups.items()}
    columns = {
        column: _floats([_over([found[column] for found in own]) for own in means.values()]) for column in COLOURS
    }
    columns = {column: values for column, values in columns.items() if not np.isnan(values).all()}
    width = 0.8 / len(columns)
    for place, (column, values) in enumerate(columns.items()):
        x = places + (place - (len(columns) - 1) / 2) * width
        bars = left.bar(x, values, width, color=COLOURS[column], label=f"{column.upper()}: {WORDS[column]}")
        left.bar_label(bars, [("" if v != v else f"{v:.3g}") for v in values], fontsize=7)
    left.set_xticks(
        places,
        [inline(name) for name in groups],
        rotation=20 if len(groups) > 3 else 0,
        ha="right" if len(groups) > 3 else "center",
    )
    left.set_xlabel(key)
    left.set_ylabel("mean perplexity over domains")
    left.margins(y=0.15)
    left.legend(fontsize=8, ncols=2)
    for place, (name, runs) in enumerate(groups.items()):
        curves = [dict(zip(*by_distance(found, "mean"), strict=True)) for found in runs]
        distance = sorted(set().union(*curves))
        means_there = [_over([curve.get(at) for curve in curves]) for at in distance]
        right.plot(distance, _floats(means_there), label=inline(name), color=colormaps["viridis"](place / len(groups)))
    right.axvline(0, color="crimson", linewidth=1)
    right.set_xlabel("domains learned since the tested domain (below 0: until its turn)")
    _ratio_axes(right)
    figure.suptitle(f"{title} by {key}", fontsize=11)
    return save(figure, path)


def _over(values: Sequence[float | None]) -> float | None:
    """The mean over seeds; None where one of them does not have the figure."""
    known = [value for value in values if value is not None and value == value]
    return float(np.mean(known)) if known and len(known) == len(values) else None
