"""The report's tables: results with their tests, cost, data, and what differs between the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import CONVENTIONS
from clpet.records import Json, Results
from clpet.reporting.comparison import Comparison
from clpet.reporting.row_diagnostics import last_values
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_groups import Row, Section, value_of
from clpet.reporting.run_metrics import MeanStd, mean_and_std, run_metrics
from clpet.reporting.significance import Difference


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the number that it is sorted by (None: by its text), and a longer text for the mouse."""

    text: str
    number: float | None = None
    bold: bool = False
    title: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table; the first `words` columns hold words, the others numbers. `titles` explain columns, by their header."""

    header: list[str]
    rows: list[list[Cell]]
    words: int
    titles: dict[str, str]


def results_table(comparison: Comparison, section: Section) -> HtmlTable:
    """A line per row: metrics over seeds, the interval of the average, and the test against the best row."""
    tests = None if section.lower else comparison.outcomes(section)
    means = [comparison.means(row, section) for row in section.rows]
    metrics = [name for name in comparison.columns(section) if any(values.get(name) for values in means)]
    best = {metric: _best_rows(comparison, section, means, metric) for metric in metrics}
    rows = []
    for index, (row, values) in enumerate(zip(section.rows, means, strict=True)):
        seeds = [run_metrics(run, section.runs, comparison.task_incremental) for _, run in row.runs]
        cells = [*map(Cell, row.cells), _number(len(row.runs), "{:.0f}")]
        for metric in metrics:
            by_seed = [(run["seed"], values.get(metric)) for (_, run), values in zip(row.runs, seeds, strict=True)]
            cells.append(_mean_cell(values.get(metric), by_seed, index in best[metric]))
        cells.append(_interval_cell(values.get("average")))
        if tests:
            cells += _test_cells(row, tests.base, tests.differences.get(row.name), tests.corrected, tests.refused)
        rows.append(cells)
    test_columns = [f"minus {tests.base.name}", "p (Holm)"] if tests else []
    titles = {
        **CONVENTIONS,
        **perplexity_transfer.FORMULAS,
        "95 % interval": "Student's t interval of the average over seeds",
        "p (Holm)": "paired bootstrap over test examples, and over seeds from three paired seeds on; corrected for "
        "the number of tests (Holm, 1979)",
        "seeds": "number of runs that differ only in their seed",
    }
    return HtmlTable([*section.columns, "seeds", *metrics, "95 % interval", *test_columns], rows,
                     len(section.columns), titles)  # fmt: skip


def _best_rows(
    comparison: Comparison, section: Section, means: list[dict[str, MeanStd | None]], metric: str
) -> list[int]:
    """The rows whose value of a metric is bold; none if all rows have the same value."""
    best = comparison.best_rows(section, [values.get(metric) for values in means], metric)
    return best if len(best) < len(means) else []


def _mean_cell(value: MeanStd | None, by_seed: Sequence[tuple[int, float | None]], bold: bool) -> Cell:
    """Mean ± standard deviation; the mouse shows the value of every seed."""
    seeds = ", ".join(f"seed {seed}: {'-' if number is None else f'{number:.2f}'}" for seed, number in by_seed)
    return Cell("-", None, False, seeds) if value is None else Cell(str(value), value.mean, bold, seeds)


def _interval_cell(average: MeanStd | None) -> Cell:
    interval = average.interval() if average else None
    return Cell(f"[{interval[0]:.2f}, {interval[1]:.2f}]", interval[0]) if interval else Cell("-")


def _test_cells(
    row: Row, base: Row, result: Difference | None, corrected: dict[str, float], refused: dict[str, str]
) -> list[Cell]:
    """The row minus the reference with its interval, and the corrected p; the reason if the pair was not tested."""
    if row is base:
        return [Cell("reference"), Cell("")]
    if result is None:
        return [Cell("not tested", title=refused.get(row.name, "it has no runs")), Cell("-")]
    value, low, high = (0.0 - number for number in (result.value, result.high, result.low))  # not -0.0
    p = corrected[row.name]
    seeds = f"95 % interval over {result.seeds} paired seed{'s' * (result.seeds > 1)}"
    return [Cell(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]", value, title=seeds), _number(p, "{:.4f}")]


def cost_table(section: Section) -> HtmlTable:
    """A line per row with the mean over seeds of every counter."""
    rows = []
    for row in section.rows:
        cells = [Cell(row.name)]
        for column in COSTS.values():
            mean = mean_and_std([column.value(run) for _, run in row.runs])
            cells.append(_number(mean.mean, column.form) if mean else Cell("-"))
        rows.append(cells)
    titles = {name: column.explanation for name, column in COSTS.items()}
    return HtmlTable(["row", *COSTS], rows, 1, titles)


def measured_table(section: Section) -> HtmlTable | None:
    """A line per row with the last values of probes and downstream tasks, mean over seeds; None without any."""
    by_row = [[last_values(run["diagnostics"]) for _, run in row.runs] for row in section.rows]
    names = list(dict.fromkeys(name for seeds in by_row for values in seeds for name in values))
    rows = []
    for row, seeds in zip(section.rows, by_row, strict=True):
        means = [mean_and_std([values.get(name) for values in seeds]) for name in names]
        rows.append([Cell(row.name), *(_number(mean.mean, "{:.4g}") if mean else Cell("-") for mean in means)])
    return HtmlTable(["row", *names], rows, 1, {}) if names else None


def options_table(section: Section) -> HtmlTable | None:
    """What differs between the rows: a line per row, a column per option; None for a single row."""
    keys = [*section.columns, *(key for key in section.other_differences if key not in section.columns)]
    if len(section.rows) < 2:
        return None
    rows = [[_word(value_of(row.options, key) or "-") for key in keys] for row in section.rows]
    return HtmlTable(keys, rows, len(keys), {})


def data_table(run: Results) -> HtmlTable | None:
    """The tasks of a run in order with the sizes of their splits; None for a run that did not record them."""
    data = cast(Mapping[str, Json], run.get("data") or {})
    tasks = cast(Mapping[str, Mapping[str, Json]], data.get("tasks") or {})
    rows = []
    for position, (name, task) in enumerate(tasks.items(), 1):
        texts_cut = task.get("texts_cut")
        cut = sum(cast(Mapping[str, int], texts_cut).values()) if texts_cut is not None else None
        counts = [task.get(key) for key in ("train", "validation", "test", "labels")]
        rows.append([Cell(name), *(_count(value) for value in (position, *counts, cut))])
    titles = {"cut": "texts longer than benchmark.max_length, over all splits"}
    header = ["task", "position", "train", "validation", "test", "labels", "cut"]
    return HtmlTable(header, rows, 1, titles) if rows else None


def _count(value: Json) -> Cell:
    return _number(value, "{:,.0f}") if isinstance(value, int | float) else Cell("-")


def _number(value: float, form: str) -> Cell:
    return Cell(form.format(value), float(value))


def _word(value: str) -> Cell:
    try:
        return Cell(value, float(value))
    except ValueError:
        return Cell(value)
