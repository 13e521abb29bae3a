"""The table that `clpet reproduce` writes: mean and interval of every row, tests, tuning, costs, published figures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from clpet.config.table_spec import Published, TableSpec
from clpet.reporting.planned_run import PlannedRun
from clpet.reporting.plots.tuning import tuning_figure
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_metrics import MeanStd
from clpet.reporting.significance import holm
from clpet.reporting.table_row import TableRow
from clpet.reporting.table_statistics import Variances, rank_correlation, root
from clpet.reporting.tables import format_table
from clpet.runtime.atomic_io import write_text

METRICS = ("task_average", "bwt", "forgetting")  # columns next to the average
SHOWN_COSTS = ("seconds", "forward_examples", "flops", "stored_bytes", "replay_bytes")
HEADER = (
    "row", "chosen", "average", "95 % interval", "p (Holm)", "own labels", "bwt", "forgetting", "default", "gain",
    "std orders", "std seeds", *SHOWN_COSTS,
)  # fmt: skip
FORMS = {"text": "txt", "md": "md", "tex": "tex", "csv": "csv"}
FIGURE = "tuning"  # name of the figure of default against tuned


@dataclass
class ResultTable:
    """All rows of a table, the best first."""

    title: str
    budget: str
    published: Mapping[str, Published | None]
    rows: list[TableRow]

    def __post_init__(self) -> None:
        sign = 1 if self.lower else -1
        self.rows.sort(key=lambda row: sign * (mean.mean if (mean := row.mean("average")) else math.inf * sign))

    @classmethod
    def of(
        cls,
        spec: TableSpec,
        budget: str,
        tuning: Sequence[PlannedRun],
        runs: Sequence[PlannedRun],
        defaults: Sequence[PlannedRun] = (),
        reused: Mapping[str, TableRow] | None = None,
    ) -> "ResultTable":
        """The table of finished runs, and of the rows whose figures are reused."""
        reused, rows = reused or {}, []
        for name in spec.rows:
            planned = [[run for run in some if run.row == name] for some in (tuning, runs, defaults)]
            if any(planned) or name not in reused:
                row = TableRow.of(name, spec, *planned)
                rows.append(reused[name].combined(row) if name in reused else row)
            else:
                rows.append(reused[name])
        return cls(spec.title, budget, {name: row.published for name, row in spec.rows.items()}, rows)

    @classmethod
    def read(cls, spec: TableSpec, budget: str, folder: Path) -> "ResultTable":
        """The table of the files of its rows in a folder. Raises DataError for a damaged file."""
        rows = [TableRow.read(file) for file in sorted(folder.glob("*.json"))]
        return cls(spec.title, budget, {name: row.published for name, row in spec.rows.items()}, rows)

    @property
    def lower(self) -> bool:
        """Whether a lower average is better."""
        return any(row.lower for row in self.rows)

    @property
    def reference(self) -> TableRow:
        """The row that others are tested against: the best of those that learn and answer under the same conditions."""
        return next((row for row in self.rows if not row.is_bound), self.rows[0])

    def tests(self) -> dict[str, float]:
        """{row: p-value of its difference from the reference}, after Holm."""
        best = self.reference
        values = {row.name: best.minus(row) for row in self.rows if row is not best}
        tested = {name: value.p for name, value in values.items() if value is not None and value.p is not None}
        return dict(zip(tested, holm(list(tested.values())), strict=True))

    def text(self, form: str) -> str:
        """The table in a format of `format_table`."""
        tests = self.tests()
        with_published = any(self.published.get(row.name) for row in self.rows)
        rows = [[*self._cells(row, tests), *(self._published(row) if with_published else [])] for row in self.rows]
        header = [*HEADER, *(["published", "gap", "why"] if with_published else [])]
        table = format_table(header, rows, form, words=2)
        if form in ("csv", "tex"):
            return table
        return "\n\n".join([f"{self.title} (budget {self.budget})", table, *self.order_lines(), self.legend()])

    def _cells(self, row: TableRow, tests: Mapping[str, float]) -> list[str]:
        mean, variances, gain, interval = row.mean("average"), row.variances(), row.gain(), row.interval()
        return [
            row.name, " ".join(row.chosen) or "-", str(mean or "-"),
            f"{interval.low:.2f} to {interval.high:.2f}" if interval and interval.low is not None else "-",
            f"{tests[row.name]:.3f}" if row.name in tests else "-",
            *(str(row.mean(name) or "-") for name in METRICS),
            f"{default.mean:.2f}" if (default := row.default_mean()) else "-",
            str(gain or "-"),
            *(("-", "-") if variances is None else (f"{root(value):.2f}" for value in variances)),
            *(COSTS[name].form.format(cost.mean) if (cost := row.mean(name)) else "-" for name in SHOWN_COSTS),
        ]  # fmt: skip

    def _published(self, row: TableRow) -> list[str]:
        figure, mean = self.published.get(row.name), row.mean("average")
        if figure is None:
            return ["", "", ""]
        gap = f"{mean.mean - figure.average:+.2f}" if mean else "-"
        return [f"{figure.average:g} ({figure.source})", gap, figure.why]

    def variances(self) -> Variances | None:
        """Mean over the rows of what orders and seeds contribute to the variance of the final average."""
        values = [value for row in self.rows if (value := row.variances()) is not None]
        return Variances(*np.mean(values, axis=0).tolist()) if values else None

    def order_correlation(self) -> float | None:
        """Mean over pairs of orders of Spearman's correlation between the rows' averages over seeds."""
        means = [_means_by_order(row) for row in self.rows]
        orders = sorted(set().union(*means)) if means else []
        values = []
        for a, b in combinations(orders, 2):
            both = [mean for mean in means if a in mean and b in mean]
            value = rank_correlation([mean[a] for mean in both], [mean[b] for mean in both])
            values += [] if value is None else [value]
        return float(np.mean(values)) if values else None

    def order_lines(self) -> list[str]:
        """What the order of the tasks contributes, in a sentence; nothing unless there are two orders and seeds."""
        variances, correlation = self.variances(), self.order_correlation()
        if variances is None:
            return []
        ranks = "" if correlation is None else f"; rank correlation of the rows between orders {correlation:.2f}"
        return [
            f"Standard deviation of an average between orders {root(variances.orders):.2f}, between seeds "
            f"{root(variances.seeds):.2f} (root of the mean variance over all rows){ranks}."
        ]

    def legend(self) -> str:
        """How the figures were computed."""
        count = max((len(row.values) for row in self.rows), default=0)
        tuning = (
            "Options were chosen on validation data, with equally many trials for every row that trains something and "
            "leaves them open. default: mean without tuning, first order; gain: how much better the tuned runs of this "
            "order are, with its interval."
        )
        return (
            f"{'Perplexity: lower is better. ' if self.lower else ''}"
            f"Mean ± standard deviation over {count} runs (seeds and orders); 95 % interval of the mean and paired "
            f"test against {self.reference.name}, the best row that is neither given the task nor learns all tasks "
            f"at once (p after Holm), {self.error_source()}. "
            f"{tuning if any(row.trials for row in self.rows) else 'Nothing was tuned.'} "
            f"{self.hours():.1f} hours of training and evaluation in {sum(row.num_runs for row in self.rows)} runs."
        )

    def error_source(self) -> str:
        """What intervals and tests count as chance."""
        answers = all(len(row.answers) == len(row.values) for row in self.rows)
        return f"Student's t over {'test examples and runs' if answers else 'runs'}"

    def hours(self) -> float:
        """Of training and evaluation in all runs, trials included."""
        return sum(row.total_seconds for row in self.rows) / 3600

    def write(self, folder: Path, with_table: bool = True) -> None:
        """Writes ROW.json for every row, and `with_table` the table as table.txt, .md, .tex and .csv, and the figure.

        The figure is drawn as tuning.svg and tuning.png if a row has runs with default values.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for row in self.rows:
            write_text(folder / f"{row.name}.json", json.dumps(row.to_json(), indent=1) + "\n")
        if not with_table:
            return
        for form, ending in FORMS.items():
            write_text(folder / f"table.{ending}", self.text(form) + "\n")
        if dumbbells := self.tuning():
            score = f"final average{' perplexity, lower is better' if self.lower else ''}"
            for ending in ("svg", "png"):
                tuning_figure(dumbbells, folder / f"{FIGURE}.{ending}", self.title, score)

    def tuning(self) -> list[tuple[str, MeanStd, MeanStd]]:
        """(row, default, tuned) of every tuned row, both in the first order."""
        return [
            (row.name, default, tuned)
            for row in self.rows
            if (default := row.default_mean()) and (tuned := row.tuned_mean()) is not None
        ]


def _means_by_order(row: TableRow) -> dict[int, float]:
    scores = row.scores()
    orders = {order for order, _ in scores}
    return {order: float(np.mean([value for key, value in scores.items() if key[0] == order])) for order in orders}
