"""Compares finished runs: metrics with their deviation over seeds, other differences between rows, and paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import inline, markdown
from clpet.metrics import perplexity_transfer
from clpet.metrics.perplexity_transfer import DAPT
from clpet.metrics.transfer_matrix import CONVENTIONS
from clpet.reporting.run_costs import COST_COLUMNS, COSTS, limit_to, mean_costs, shown, smallest_first
from clpet.reporting.run_groups import (
    SPLIT,
    TASK_GIVEN,
    Row,
    Runs,
    Section,
    choose_on_validation,
    differing_options,
    fingerprint,
    make_sections,
    value_of,
    values_by_row,
)
from clpet.reporting.run_metrics import MeanStd, mean_and_std, pretraining_metrics, run_metrics, validation_average
from clpet.reporting.significance import MIN_SEEDS, NUM_DRAWS, Difference, difference, holm
from clpet.reporting.tables import format_table
from clpet.runtime.untrusted_json import train_command

COLUMNS = ("average", "whole", "bwt", "fwt", "forgetting", "learning_accuracy")  # default columns for accuracies
PICTURE_FORMATS = (".png", ".pdf", ".svg")
LOWER_IS_BETTER = ("forgetting", "intransigence")  # among the metrics of accuracies
CSV_COLUMNS = ("benchmark", "objective", "metric", "data", "split", "view")  # columns of CSV before the options


@dataclass(frozen=True)
class Tests:
    """Paired tests of the row `base` against the others, by their names: results, p after Holm, or why not tested."""

    base: Row
    differences: dict[str, Difference]
    corrected: dict[str, float]
    refused: dict[str, str]


class Figure(NamedTuple):
    """A metric of a row: benchmark, objective, score and data; the split; the options' values; mean and deviation."""

    measure: list[str]
    split: str
    options: list[str]
    metric: str
    mean: MeanStd | None


@dataclass
class Comparison:
    """A comparison of runs by the options `keys`, with the metrics as columns (none given: the default columns)."""

    keys: list[str]
    metrics: list[str] = field(default_factory=list)
    task_incremental: bool = False  # only each task's own labels compete (--view own)
    by_validation: bool = False  # of all settings of a row show only the best one on validation
    against: str | None = None  # row that the others are tested against; None: the best one
    form: str = "text"  # text | md | csv | tex
    costs: bool = False  # also show what the rows have cost
    budget: dict[str, float] = field(default_factory=dict)  # leave out rows that cost more (--budget)
    sort: str | None = None  # metric or cost that the rows are sorted by, smallest first

    def report(self, runs: Runs) -> str:
        """The text that `clpet runs --compare` prints. Raises ConfigError and DataError."""
        sections = self.sections(runs)
        if self.against is not None:
            if self.form not in ("text", "md"):
                raise ConfigError("--against adds tests, which only --format text and md print")
            if not any(self.reference_row(section) for section in sections):
                names = [f"'{row.name}'" for section in sections for row in section.rows]
                raise ConfigError(f"--against {self.against}: no row has this name{suggest(self.against, names)}")
        if self.form == "csv":
            return self.csv(sections)
        return "\n\n".join(block for section in sections for block in self.blocks(section, sections))

    def sections(self, runs: Runs) -> list[Section]:
        """The tables with their rows in order. Raises ConfigError and DataError."""
        formulas = {**CONVENTIONS, **perplexity_transfer.FORMULAS, **COSTS}
        for metric in [*self.metrics, *([self.sort] if self.sort else [])]:
            if metric not in formulas:
                raise ConfigError(f"unknown metric {metric}{suggest(metric, formulas)}")
        sections = make_sections(runs, self.keys)
        for section in sections:
            limit_to(section, self.budget)
        sections = [section for section in sections if section.rows]
        if not sections:
            raise DataError("--budget: no row is within the budget; clpet runs --compare KEY --costs shows the costs")
        for section in sections if self.sort else ():
            means = {row.name: self.means(row, section).get(str(self.sort)) for row in section.rows}
            section.rows.sort(key=partial(smallest_first, means))
        if self.task_incremental:
            sections = [section for section in sections if not section.lower]
            if not sections:
                raise ConfigError("--view own needs runs with labels; these runs have perplexities: leave it out")
        if not self.by_validation:
            return sections
        chosen = choose_on_validation(sections, lambda runs: mean.mean if (mean := self.on_validation(runs)) else None)
        if not chosen:
            raise DataError(
                "--by validation: no run was measured on validation (train with evaluation.split=validation)"
            )
        return chosen

    def means(self, row: Row, section: Section) -> dict[str, MeanStd | None]:
        """{metric: mean and deviation} over the seeds of a row; None for a metric that a seed lacks."""
        seeds = [run_metrics(run, section.runs, self.task_incremental) for _, run in row.runs]
        columns = {name: [values.get(name) for values in seeds] for name in (seeds[0] if seeds else ())}
        return {**{name: mean_and_std(values) for name, values in columns.items()}, **mean_costs(row)}

    def best(self, section: Section, rows: list[Row]) -> Row | None:
        """The row with the best final average; None if no row has one."""
        means = [(average.mean, row) for row in rows if (average := self.means(row, section).get("average"))]
        return (min if section.lower else max)(means, key=lambda pair: pair[0])[1] if means else None

    # Text, Markdown and LaTeX

    def blocks(self, section: Section, sections: list[Section]) -> list[str]:
        """A section's table with its title and notes, and its tests."""
        lines = [self.title(section, sections), *self.notes(section)]
        if self.form != "text":
            lines = [f"% {inline(line)}" if self.form == "tex" else markdown(line) for line in lines]
        gap = "\n\n" if self.form == "md" else "\n"
        tests = self.tests(section) if self.form != "tex" and not section.lower else []
        return [gap.join([lines[0], self.table(section), *lines[1:]]), *([gap.join(tests)] if tests else [])]

    def title(self, section: Section, sections: list[Section]) -> str:
        """The benchmark and metric of a section; if other sections use other data, also the options behind them."""
        data, others = "", [other.rows[0] for other in sections if other.benchmark == section.benchmark]
        if section.data and {fingerprint(row.evidence[0][1]) for row in others} != {section.data}:
            keys = [key for key in differing_options(others) if key.startswith("benchmark.")]
            options = (f"{key}={section.rows[0].options.get(key)}" for key in keys)
            data = f" ({', '.join([f'data {section.data[:8]}', *options])})"
        clauses = [
            section.metric + (", lower is better" if section.lower else " in %"),
            "among each task's own labels (task-incremental view)" if self.task_incremental else "",
            "measured on validation" if section.split != "test" else "",
            "settings chosen on validation, figures on test" if self.by_validation else "",
            "mean ± standard deviation over seeds",
        ]
        return f"{section.benchmark}{data}: {', '.join(filter(None, clauses))}"

    def table(self, section: Section) -> str:
        """The table of options and metrics."""
        metrics = self.columns(section)
        means = [self.means(row, section) for row in section.rows]
        rows = [
            [
                *row.cells,
                *([str(row.num_settings), str(self.on_validation(row.chosen_by))] if self.by_validation else []),
                str(len(row.runs)),
                *(shown(metric, values.get(metric)) for metric in metrics),
            ]
            for row, values in zip(section.rows, means, strict=True)
        ]
        header = [*section.columns, *(["settings", "validation"] if self.by_validation else []), "seeds", *metrics]
        start, words = len(header) - len(metrics), len(section.columns)
        bold = {
            (row, start + column)
            for column, metric in enumerate(metrics)
            for row in self.best_rows(section, [values.get(metric) for values in means], metric)
        }
        return format_table(header, rows, self.form, words, bold)

    def columns(self, section: Section) -> Sequence[str]:
        """The metrics shown for a section."""
        metrics = self.metrics or (perplexity_transfer.COLUMNS if section.lower else COLUMNS)
        return [*metrics, *(name for name in COST_COLUMNS if self.costs and name not in metrics)]

    def on_validation(self, runs: Runs) -> MeanStd | None:
        """The final average on validation over the seeds of a setting."""
        return mean_and_std([validation_average(run, self.task_incremental) for _, run in runs])

    def best_rows(self, section: Section, column: Sequence[MeanStd | None], metric: str) -> list[int]:
        """Indices of the rows with the best printed value of a metric; rows that are given the task do not compete."""
        means = {
            index: round(value.mean, 2)  # as printed: rows that look equal are all marked
            for index, (row, value) in enumerate(zip(section.rows, column, strict=True))
            if value and self.competes(row)
        }
        lower = section.lower or metric in LOWER_IS_BETTER or metric in COSTS
        best = (min if lower else max)(means.values(), default=None)
        return [index for index, mean in means.items() if mean == best]

    def competes(self, row: Row) -> bool:
        """Whether a row may be compared with the others: a row that is given the task solves an easier problem."""
        return self.task_incremental or not row.task_given

    def notes(self, section: Section) -> list[str]:
        """Caveats printed below a table."""
        lines = [f"also differs: {key}: {values_by_row(section.rows, key)}" for key in section.other_differences]
        if len({frozenset(run["tasks"]) for row in section.rows for _, run in row.evidence}) > 1:
            lines.append("the task lists differ: averages are over different tasks")
        if few := [row.name for row in section.rows if len(row.runs) < MIN_SEEDS]:
            which = "" if len(few) == len(section.rows) else f" ({'; '.join(few)})"
            lines.append(
                f"fewer than {MIN_SEEDS} seeds{which}: tests sample {section.split} examples, seeds are not sampled"
            )
        lines += [f"over budget: {row}" for row in section.over_budget]
        if section.left_out:
            lines.append(f"left out, since it has no runs on validation: {'; '.join(section.left_out)}")
        pending = [row for row in section.rows if not row.runs]
        return [*lines, *(f"not run on test yet: {row.name}: {test_command(row)}" for row in pending)]

    # Tests

    def reference_row(self, section: Section) -> Row | None:
        """The row that --against names, by its full name or its first value. Raises ConfigError if several match."""
        rows = [row for row in section.rows if row.name == self.against]
        rows = rows or [row for row in section.rows if next(iter(row.columns.values())) == self.against]
        if len(rows) > 1:
            names = "; ".join(f"--against '{row.name}'" for row in rows)
            raise ConfigError(f"--against {self.against} matches {len(rows)} rows; use one of {names}")
        return rows[0] if rows else None

    def outcomes(self, section: Section) -> Tests | None:
        """The paired tests of one row (--against, else the best) against each of the others; None without a pair."""
        rows = [row for row in section.rows if row.runs]
        base = self.reference_row(section) if self.against else self.best(section, list(filter(self.competes, rows)))
        if base is None or not base.runs or len(rows) < 2:
            return None
        results = {row.name: self.test(base, row) for row in rows if row is not base}
        differences = {name: result for name, result in results.items() if isinstance(result, Difference)}
        corrected = holm([result.p for result in differences.values()])
        refused = {name: reason for name, reason in results.items() if not isinstance(reason, Difference)}
        return Tests(base, differences, dict(zip(differences, corrected, strict=True)), refused)

    def tests(self, section: Section) -> list[str]:
        """Title, table and remarks of the paired tests of one row against each of the others."""
        tests = self.outcomes(section)
        if tests is None:
            return []
        name = tests.base.name
        refused = [f"not tested: {name} against {other}: {reason}" for other, reason in tests.refused.items()]
        cells = [
            [other, f"{result.value:+.2f}", f"[{result.low:+.2f}, {result.high:+.2f}]",
             f"{result.p:.4f}", f"{tests.corrected[other]:.4f}", str(result.seeds)]
            for other, result in tests.differences.items()
        ]  # fmt: skip
        samples = (
            f"over {section.split} examples, and over seeds where at least {MIN_SEEDS} are paired ({NUM_DRAWS} draws)"
        )
        title = f"{name} minus each other row, final average score: paired bootstrap {samples}"
        title += f"; p (Holm) is corrected for {len(cells)} comparisons" if len(cells) > 1 else ""
        header = ["other", "difference", "95 % interval", "p", "p (Holm)", "paired seeds"]
        if self.form == "md":
            title, refused = markdown(title), [markdown(line) for line in refused]
        return [*([title, format_table(header, cells, self.form)] if cells else []), *refused]

    def test(self, base: Row, row: Row) -> Difference | str:
        """`base` minus `row`, or the reason why the two cannot be tested."""
        if easier := next((one for one in (row, base) if not self.competes(one)), None):
            return f"{easier.name} is given the task at test (--view own gives it to all)"
        return difference(base.runs, row.runs, self.task_incremental)

    # Figures: one line per row and metric, for CSV and for programs

    def csv(self, sections: list[Section]) -> str:
        """All sections as one tidy table: one value per cell."""
        names, figures = self.figures(sections)
        cells = [[*words, split, self.view, *values, metric, *_numbers(mean)]
                 for words, split, values, metric, mean in figures]  # fmt: skip
        return format_table([*CSV_COLUMNS, *names, "figure", "mean", "std", "n"], cells, "csv")

    @property
    def view(self) -> str:
        """The labels that compete: `own` (the task's only) or `all` (seen so far)."""
        return "own" if self.task_incremental else "all"

    def figures(self, sections: list[Section]) -> tuple[list[str], list[Figure]]:
        """The names of the options that differ, and every figure with the options' values."""
        options = list(
            dict.fromkeys(
                key for section in sections for key in (*section.columns, TASK_GIVEN, *section.other_differences)
            )
        )
        figures: list[Figure] = []
        for section in sections:
            for row in section.rows:
                values = [row.columns.get(key) or value_of(row.options, key) or "" for key in options]
                kind = [section.benchmark, section.objective, section.metric, fingerprint(row.evidence[0][1])]
                means = self.means(row, section)
                cells = [(section.split, metric, means.get(metric)) for metric in self.columns(section)]
                if self.by_validation:
                    cells.append(("validation", "average", self.on_validation(row.chosen_by)))
                figures += [Figure(kind, split, values, metric, mean) for split, metric, mean in cells]
        return options, figures

    # Picture

    def draw(self, runs: Runs, path: Path) -> Path:
        """Draws the rows of one table next to each other, scores or perplexities; the path's ending is the format.

        Raises ConfigError for another ending, and if the runs do not fit into one table.
        """
        from clpet.reporting.plots.comparison import compare_rows  # matplotlib takes a second to import
        from clpet.reporting.plots.perplexity import plot_groups

        if path.suffix not in PICTURE_FORMATS:
            raise ConfigError(f"--picture {path}: the name must end in {', '.join(PICTURE_FORMATS)}")
        sections = self.sections(runs)
        tested = [section for section in sections if section.split == "test"] or sections
        if len(tested) > 1:
            titles = "; ".join(self.title(section, sections) for section in tested)
            raise ConfigError(
                f"--picture draws one table, but there are {len(tested)}: select one with --benchmark ({titles})"
            )
        (section,) = tested
        if not section.lower:
            return compare_rows(section, path, self.title(section, sections))
        groups = {
            row.name: [pretraining_metrics(run, section.runs) for _, run in row.runs if run["method"] != DAPT]
            for row in section.rows
        }
        groups = {name: seeds for name, seeds in groups.items() if seeds}
        return plot_groups(groups, ", ".join(self.keys), path, section.benchmark)


def _numbers(value: MeanStd | None) -> list[str]:
    """[mean, std, n] as CSV cells."""
    if value is None:
        return ["", "", "0"]
    return [repr(round(value.mean, 6)), "" if value.std is None else repr(round(value.std, 6)), str(value.n)]


def test_command(row: Row) -> str:
    """The command that measures on test the setting that was chosen on validation."""
    seeds = ",".join(sorted({str(run["seed"]) for _, run in row.chosen_by}))
    overrides = [
        word for word in row.chosen_by[0][1]["overrides"] if word.partition("=")[0] not in (SPLIT, "seed", "fresh")
    ]
    sweep = ["-m"] if "," in seeds else []
    return train_command(row.chosen_by[0][1], [*sweep, *overrides, f"seed={seeds}"])
