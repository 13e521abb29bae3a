"""The report's charts as Vega-Lite specifications: data and encodings; the page draws them.

Names from data are only values of the data, never part of an expression or of a field's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clpet.records import Json
from clpet.reporting.points import (
    Point,
    cost_points,
    loss_points,
    measured_points,
    metric_points,
    seen_averages,
    transfer_points,
)
from clpet.reporting.row_diagnostics import DOWNSTREAM, MEANINGS, PANELS, PROBES, series
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_groups import Section

Spec = dict[str, Json]
NUMBERS = ("x", "y", "low", "high")  # fields of a point
FADED = 0.12  # opacity of what is not selected in the legend


@dataclass(frozen=True)
class Chart:
    """A chart with its title and a sentence about how to read it."""

    title: str
    caption: str
    points: list[Point]
    spec: Spec


def charts(section: Section) -> list[Chart]:
    """The charts of a section; those without any value are left out."""
    unit = section.metric if section.lower else "average in %"
    names = [row.name for row in section.rows]
    seen, losses, costs = seen_averages(section), loss_points(section), cost_points(section)
    result = [
        Chart(
            f"{'Perplexity' if section.lower else 'Average'} after each task",
            "Mean over the tasks seen so far; the band is the standard deviation over seeds. Click names to compare.",
            seen,
            lines(seen, "tasks learned", unit, names),
        )
    ]
    if section.lower:
        points = transfer_points(section)
        caption = "Perplexity over zero-shot; left: domains still to come, right: domains learned since."
        spec = lines(points, "domains learned since the tested one", "perplexity / zero-shot", names)
        result.append(Chart("Transfer by distance", caption, points, spec))
    else:
        points = metric_points(section, "learning_accuracy", "forgetting")
        caption = "Best is the lower right corner: tasks are learned well and stay known."
        spec = dots(points, "learning accuracy", "forgetting", names)
        result.append(Chart("Learning and forgetting", caption, points, spec))
    caption = "Seconds of training over all tasks; bars are standard deviations over seeds."
    result.append(Chart("Cost and score", caption, costs, dots(costs, "training seconds", unit, names)))
    for cost, title, axis in (("flops", "Compute and score", "FLOPs"), ("stored_bytes", "Storage and score", "bytes")):
        points, caption = cost_points(section, cost), f"{COSTS[cost].explanation}; bars as above.".capitalize()
        result.append(Chart(title, caption, points, dots(points, axis, unit, names)))
    caption = "One line per seed, averaged over neighbouring steps."
    result.append(Chart("Training loss", caption, losses, loss_lines(losses, names)))
    return [chart for chart in result if chart.points]


def measured_charts(section: Section) -> list[Chart]:
    """A chart of every probe of the pictures, and of every downstream task and its metrics."""
    names, result = [row.name for row in section.rows], []
    caption = "Measured along with the matrix, and no part of its averages; the band is the deviation over seeds."
    for title, prefix, name in [*_probes(), *_downstream(section)]:
        points = measured_points(section, prefix, name)
        if points:
            result.append(Chart(title, caption, points, lines(points, "tasks learned", name, names)))
    return result


def _probes() -> list[tuple[str, str, str]]:
    """(title, prefix, name) of the probes that are drawn."""
    kinds = [(title, name, MEANINGS.get(name.rpartition("/")[2])) for title, names in PANELS.items() for name in names]
    return [(f"{title}, {text}" if text else title, PROBES, name) for title, name, text in kinds]


def _downstream(section: Section) -> list[tuple[str, str, str]]:
    names = [name for row in section.rows for _, run in row.runs for name in series(run["diagnostics"], DOWNSTREAM)]
    return [(name, DOWNSTREAM, name) for name in dict.fromkeys(names)]


def lines(points: Sequence[Point], x: str, y: str, names: Sequence[str]) -> Spec:
    """A line per row with a band from `low` to `high`. The legend selects rows."""
    tooltip = [("row", "row"), ("x", x), ("after", "after"), ("y", y), ("low", "low"), ("high", "high")]
    steps: Json = {"zero": False, "nice": False, "padding": 12}  # whole numbers: the axis ends where the lines do
    across: Json = {**_axis("x", x, {"tickMinStep": 1, "format": "d"}), "scale": steps}
    encoding: Json = {"x": across, "color": _colour(points, names)}
    value, shade = _axis("y", y), min(0.15, 0.9 / len(names))  # many bands would hide the lines
    band: Json = {
        "mark": "area",
        "encoding": {"y": {**value, "field": "low"}, "y2": {"field": "high"}, "opacity": _picked(shade, shade / 8)},
    }
    line: Json = {
        "params": [LEGEND],
        "mark": {"type": "line", "point": {"size": 36}, "strokeWidth": 2},
        "encoding": {"y": value, "opacity": _picked(1, FADED), "tooltip": _tooltip(tooltip)},
    }
    return {"data": {"values": list(points)}, "encoding": encoding, "layer": [line, band], **SIZE}


def dots(points: Sequence[Point], x: str, y: str, names: Sequence[str]) -> Spec:
    """A dot per row with bars of one standard deviation to all four sides."""
    across, up = _axis("x", x), _axis("y", y)
    encoding: Json = {"color": _colour(points, names), "opacity": _picked(1, FADED)}
    tooltip = _tooltip([("row", "row"), ("x", x), ("y", y), ("seeds", "seeds")])
    dot: Json = {
        "params": [LEGEND],
        "mark": {"type": "point", "filled": True, "size": 90},
        "encoding": {"x": across, "y": up, "tooltip": tooltip},
    }
    bars: list[Json] = [
        {"mark": "rule", "encoding": {"x": {**across, "field": "left"}, "x2": {"field": "right"}, "y": up}},
        {"mark": "rule", "encoding": {"y": {**up, "field": "low"}, "y2": {"field": "high"}, "x": across}},
    ]
    return {"data": {"values": list(points)}, "encoding": encoding, "layer": [dot, *bars], **SIZE}


def loss_lines(points: Sequence[Point], names: Sequence[str]) -> Spec:
    """A thin line per run, coloured by row."""
    encoding: Json = {
        "x": _axis("x", "step"),
        "y": _axis("y", "loss"),
        "color": _colour(points, names),
        "detail": [{"field": "seed"}, {"field": "stage"}],
        "opacity": _picked(0.7, 0.05),
        "tooltip": _tooltip(
            [("row", "row"), ("seed", "seed"), ("task", "task"), ("stage", "stage"), ("x", "step"), ("y", "loss")]
        ),
    }
    mark: Json = {"type": "line", "strokeWidth": 1.2}
    return {"data": {"values": list(points)}, "params": [LEGEND], "mark": mark, "encoding": encoding, **SIZE}


SIZE: Mapping[str, Json] = {"width": "container", "height": 260}
LEGEND: Json = {"name": "rows", "select": {"type": "point", "fields": ["row"]}, "bind": "legend"}


def _colour(points: Sequence[Point], names: Sequence[str]) -> Json:
    """The colour of each of the rows `names`, the same in every chart; the legend has those with points."""
    drawn = {point["row"] for point in points}
    legend: Json = {"values": [name for name in names if name in drawn]}
    return {"field": "row", "type": "nominal", "title": None, "scale": {"domain": list(names)}, "legend": legend}


def _picked(value: float, otherwise: float) -> Json:
    return {"condition": {"param": "rows", "value": value}, "value": otherwise}


def _axis(field: str, title: str, axis: Mapping[str, Json] | None = None) -> dict[str, Json]:
    scale: Json = {"zero": False, "nice": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis or {}}


def _tooltip(fields: Sequence[tuple[str, str]]) -> Json:
    """[(field, title)] as a tooltip; numbers have four significant digits."""
    number: dict[str, Json] = {"type": "quantitative", "format": ",.4~g"}
    return [{"field": name, "title": title, **(number if name in NUMBERS else {})} for name, title in fields]
