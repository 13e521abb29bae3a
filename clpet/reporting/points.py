"""The numbers that charts of a comparison draw, per row: means and deviations over seeds."""

from clpet.records import Json
from clpet.reporting.plots.perplexity import by_distance
from clpet.reporting.row_diagnostics import series
from clpet.reporting.run_costs import mean_costs
from clpet.reporting.run_groups import Row, Section
from clpet.reporting.run_metrics import MeanStd, matrix_of, mean_and_std, pretraining_metrics
from clpet.reporting.step_lines import mean_losses

Point = dict[str, Json]


def _mean_point(row: Row, x: float, value: MeanStd, **others: Json) -> Point:
    std = value.std or 0.0
    numbers = {"x": x, "y": value.mean, "low": value.mean - std, "high": value.mean + std}
    return {"row": row.name, "seeds": value.n, **{key: _short(number) for key, number in numbers.items()}, **others}


def _short(value: float) -> float:
    """A number with six significant digits, which no chart shows more of."""
    return float(f"{value:.6g}")


def seen_averages(section: Section) -> list[Point]:
    """Per row and number of learned tasks: the mean score of these tasks, mean and deviation over seeds."""
    points = []
    for row in section.rows:
        matrices = [matrix_of(run) for _, run in row.runs]
        for learned in range(1, min(map(len, matrices), default=0) + 1):
            value = mean_and_std([matrix.average(learned, learned) for matrix in matrices])
            names = {matrix.tasks[learned - 1] for matrix in matrices}
            if value:
                points.append(_mean_point(row, learned, value, after=names.pop() if len(names) == 1 else "-"))
    return points


def measured_points(section: Section, prefix: str, name: str) -> list[Point]:
    """Per row and number of learned tasks: a value measured along with the matrix, mean and deviation over seeds."""
    points = []
    for row in section.rows:
        by_seed = [series(run["diagnostics"], prefix).get(name, {}) for _, run in row.runs]
        tasks = [run["tasks"] for _, run in row.runs]
        for learned in sorted(set().union(*by_seed)):
            value = mean_and_std([values.get(learned) for values in by_seed])
            names = {order[learned - 1] if learned else "(before)" for order in tasks}
            if value:
                points.append(_mean_point(row, learned, value, after=names.pop() if len(names) == 1 else "-"))
    return points


def transfer_points(section: Section) -> list[Point]:
    """Per row and distance: perplexity over zero-shot, mean over domains, then mean and deviation over seeds."""
    points = []
    for row in section.rows:
        curves = [
            dict(zip(*by_distance(pretraining_metrics(run, section.runs), "mean"), strict=True)) for _, run in row.runs
        ]
        for distance in sorted(set().union(*curves)):
            value = mean_and_std([float(c[distance]) if c.get(distance) == c.get(distance) else None for c in curves])
            if value and value.mean == value.mean:
                points.append(_mean_point(row, distance, value, after="-"))
    return points


def metric_points(section: Section, x: str, y: str) -> list[Point]:
    """Per row two metrics of the matrix with their deviations over seeds."""
    points = []
    for row in section.rows:
        metrics = [matrix_of(run).metrics() for _, run in row.runs]
        across, up = (mean_and_std([values[name] for values in metrics]) for name in (x, y))
        if across and up:
            points.append(_dot(row, across, up))
    return points


def cost_points(section: Section, cost: str = "seconds") -> list[Point]:
    """Per row one of COSTS, by default the seconds of training, and the final average."""
    points = []
    for row in section.rows:
        across, average = mean_costs(row)[cost], mean_and_std([matrix_of(run).average() for _, run in row.runs])
        if across and average:
            points.append(_dot(row, across, average))
    return points


def _dot(row: Row, x: MeanStd, y: MeanStd) -> Point:
    std = x.std or 0.0
    return _mean_point(row, x.mean, y, left=_short(x.mean - std), right=_short(x.mean + std))


def loss_points(section: Section) -> list[Point]:
    """The losses of the step logs, thinned; empty for runs without one."""
    return [
        {"row": row.name, "seed": run["seed"], "x": step, "y": _short(loss), "task": task, "stage": stage}
        for row in section.rows
        for path, run in row.runs
        for step, loss, task, stage in mean_losses(path)
    ]
