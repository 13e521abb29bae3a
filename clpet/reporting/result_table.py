"""The table that `clpet reproduce` writes: mean and interval of every row, tests, costs, and what was published."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from clpet.config.table_spec import Published, TableSpec
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Json, Results
from clpet.reporting.planned_run import PlannedRun
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_metrics import MeanStd, mean_and_std, t_probability
from clpet.reporting.significance import holm
from clpet.reporting.tables import format_table
from clpet.runtime.atomic_io import write_text

METRICS = ("average", "task_average", "bwt", "forgetting")  # of a run, in its file and in the table
HEADER = ("row", "chosen", "average", "95 % interval", "p (Holm)", "own labels", "bwt", "forgetting")
COST_COLUMNS = ("seconds", "flops", "stored_bytes", "replay_bytes")
FORMS = {"text": "txt", "md": "md", "tex": "tex", "csv": "csv"}


@dataclass
class TableRow:
    """A row: the values of all its runs by (order, seed), and the trials that its options were chosen by."""

    name: str
    chosen: list[str]
    trials: list[tuple[list[str], float | None]]
    values: dict[tuple[int, int], dict[str, float | None]] = field(default_factory=dict)
    signatures: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    versions: Json = None  # of the packages in its first run

    def mean(self, name: str) -> MeanStd | None:
        """Mean and standard deviation of a value over seeds and orders."""
        return mean_and_std([values[name] for values in self.values.values()])

    def averages(self) -> dict[tuple[int, int], float]:
        """The final average of every run that has one."""
        return {key: value["average"] for key, value in self.values.items() if value["average"] is not None}

    def to_json(self) -> dict[str, Json]:
        """What is committed of a row."""
        runs: list[Json] = [
            {"order": order, "seed": seed, **values} for (order, seed), values in sorted(self.values.items())
        ]
        trials: list[Json] = [{"words": list(words), "validation": score} for words, score in self.trials]
        return {
            "row": self.name, "versions": self.versions, "words": list(self.words), "chosen": list(self.chosen),
            "trials": trials, "runs": runs, "signatures": list(self.signatures),
        }  # fmt: skip


@dataclass
class ResultTable:
    """All rows of a table, the best first."""

    title: str
    budget: str
    published: Mapping[str, Published | None]
    rows: list[TableRow]
    lower: bool = False

    @classmethod
    def of(
        cls, spec: TableSpec, budget: str, tuning: Sequence[PlannedRun], runs: Sequence[PlannedRun]
    ) -> "ResultTable":
        """The table of finished runs."""
        rows = []
        lower = False
        for name in spec.rows:
            of_row = [run for run in runs if run.row == name]
            trials = [(run.trial, run.average) for run in tuning if run.row == name]
            row = TableRow(name, of_row[0].trial, trials, words=[*spec.words, *spec.rows[name].words])
            for run in of_row:
                if results := run.results:
                    lower = results["direction"] == "lower"
                    row.values[run.order, run.seed] = measured(results)
                    row.signatures.append(str(results["signature"]))
                    row.versions = row.versions or cast(dict[str, Json], results).get("versions")
            rows.append(row)
        sign = 1 if lower else -1
        rows.sort(key=lambda row: sign * (mean.mean if (mean := row.mean("average")) else math.inf * sign))
        return cls(spec.title, budget, {name: row.published for name, row in spec.rows.items()}, rows, lower)

    def tests(self) -> dict[str, float]:
        """{row: p-value of its difference from the best row}: paired t-tests over seeds and orders, after Holm."""
        best = self.rows[0].averages()
        values = {row.name: paired_t_test(best, row.averages()) for row in self.rows[1:]}
        tested = {name: p for name, p in values.items() if p is not None}
        return dict(zip(tested, holm(list(tested.values())), strict=True))

    def text(self, form: str) -> str:
        """The table in a format of `format_table`."""
        tests, rows = self.tests(), []
        header = [
            "row",
            "chosen",
            "average",
            "95 % interval",
            "p (Holm)",
            "own labels",
            "bwt",
            "forgetting",
            *COST_COLUMNS,
        ]
        with_published = any(self.published.values())
        for row in self.rows:
            mean = row.mean("average")
            interval = mean.interval() if mean else None
            cells = [
                row.name, " ".join(row.chosen) or "-", str(mean or "-"),
                f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "-",
                f"{tests[row.name]:.3f}" if row.name in tests else "-",
                *(str(row.mean(name) or "-") for name in METRICS[1:]),
                *(COSTS[name].form.format(cost.mean) if (cost := row.mean(name)) else "-" for name in COST_COLUMNS),
            ]  # fmt: skip
            rows.append([*cells, *self._published(row, mean)] if with_published else cells)
        header += ["published", "gap", "why"] if with_published else []
        table = format_table(header, rows, form, words=2)
        return table if form in ("csv", "tex") else f"{self.title} (budget {self.budget})\n\n{table}\n\n{self.legend()}"

    def _published(self, row: TableRow, mean: MeanStd | None) -> list[str]:
        figure = self.published.get(row.name)
        if figure is None:
            return ["", "", ""]
        gap = f"{mean.mean - figure.average:+.2f}" if mean else "-"
        return [f"{figure.average:g} ({figure.source})", gap, figure.why]

    def legend(self) -> str:
        """How the figures were computed."""
        count = max((len(row.values) for row in self.rows), default=0)
        return (
            f"Mean ± standard deviation over {count} runs (seeds and orders); Student's t interval of the mean; paired "
            "t-tests against the first row, corrected after Holm. Options were chosen on validation data, with equally "
            "many trials for every row that trains something and leaves them open."
        )

    def write(self, folder: Path, with_table: bool = True) -> None:
        """Writes ROW.json for every row, and `with_table` the table as table.txt, .md, .tex and .csv."""
        folder.mkdir(parents=True, exist_ok=True)
        for row in self.rows:
            write_text(folder / f"{row.name}.json", json.dumps(row.to_json(), indent=1) + "\n")
        for form, ending in FORMS.items() if with_table else ():
            write_text(folder / f"table.{ending}", self.text(form) + "\n")


def measured(results: Results) -> dict[str, float | None]:
    """The figures of a run that a table keeps."""
    matrix, task_matrix = TransferMatrix.from_json(results), TransferMatrix.from_json(results, results["task_scores"])
    figures: dict[str, float | None] = {
        "average": matrix.average(),
        "task_average": task_matrix.average(),
        "bwt": matrix.backward_transfer(),
        "forgetting": matrix.forgetting(),
    }
    return figures | {name: COSTS[name].value(results) for name in COST_COLUMNS}


def paired_t_test(a: Mapping[tuple[int, int], float], b: Mapping[tuple[int, int], float]) -> float | None:
    """The two-sided p-value of the paired t-test over the runs that both have; None for fewer than two pairs."""
    common = sorted(a.keys() & b.keys())
    differences = np.array([a[key] - b[key] for key in common])
    if len(differences) < 2:
        return None
    std = float(differences.std(ddof=1))
    if std == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return t_probability(float(differences.mean()) / std * math.sqrt(len(differences)), len(differences) - 1)
