"""The runs that a table of results consists of. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.config.table_spec import TableSpec
from clpet.errors import ConfigError, DataError
from clpet.reporting.planned_run import PlannedRun

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from clpet.reporting.table_row import TableRow


@dataclass(frozen=True)
class TablePlan:
    """The runs of a table, with their directories in a folder; of the rows in `reused`, only those that these lack."""

    spec: TableSpec
    output: Path
    reused: Mapping[str, "TableRow"] = field(default_factory=dict)

    def run(self, row: str, trial: list[str], seed: int, order: int = 0, on_validation: bool = False) -> PlannedRun:
        """A run of a row. Raises ConfigError for words that do not compose."""
        from clpet.config.identity import portable_signature, run_name

        words = [*self.spec.run_words(row, trial, seed, self.spec.orders[order]), f"output_dir={self.output}"]
        if on_validation:
            words.append("evaluation.split=validation")
        cfg = compose(row, words)
        return PlannedRun(row, words, self.output / run_name(cfg), seed, order, trial, portable_signature(cfg))

    def tuning(self) -> list[PlannedRun]:
        """The trials on validation data, with the first seed and order."""
        return [
            self.run(row, trial, self.spec.seeds[0], on_validation=True)
            for row in self.spec.rows
            if row not in self.reused
            for trial in self.spec.trials(row)
        ]

    def final(self, tuning: Sequence[PlannedRun]) -> list[PlannedRun]:
        """The runs on test data: every seed in every order, with the values that were best on validation data."""
        chosen = {
            row: self.reused[row].chosen
            if row in self.reused
            else best_trial([run for run in tuning if run.row == row])
            for row in self.spec.rows
        }
        return [
            self.run(row, chosen[row], seed, order)
            for row in self.spec.rows
            for order in range(len(self.spec.orders))
            for seed in self.spec.seeds
            if row not in self.reused or (order, seed) not in self.reused[row].values
        ]

    def untuned(self) -> list[PlannedRun]:
        """The runs on test data without the values of a trial, of rows that have trials: all seeds, the first order."""
        return [
            self.run(row, [], seed)
            for row in self.spec.rows
            if any(self.spec.trials(row))
            for seed in self.spec.seeds
            if row not in self.reused or (0, seed) not in self.reused[row].defaults
        ]

    def further(self, row: str) -> list[PlannedRun]:
        """The runs that the figures of a reused row lack."""
        one_row = replace(self, spec=replace(self.spec, rows={row: self.spec.rows[row]}))
        return [*one_row.final([]), *one_row.untuned()]


def compose(row: str, words: Sequence[str]) -> "DictConfig":
    """The checked configuration of a run. Raises ConfigError with the name of its row."""
    from clpet.cli.error_messages import format_error
    from clpet.config.build import parse_config
    from clpet.config.compose import compose_config

    try:
        cfg = compose_config([*words])
        parse_config(cfg)
    except Exception as error:  # of Hydra, OmegaConf or clpet
        raise ConfigError(f"row {row}: {format_error(error)[0]}") from error
    return cfg


def best_trial(trials: Sequence[PlannedRun]) -> list[str]:
    """The values with the highest average on validation data, the first of equals; [] without trials."""
    from clpet.metrics.transfer_matrix import TransferMatrix

    if not trials:
        return []
    scores = []
    for run in trials:
        results = run.results
        if results is None:
            raise DataError(f"a trial of {run.row} has not finished: {run.out}")
        average = TransferMatrix.from_json(results).final()
        sign = 1 if results["direction"] == "higher" else -1
        scores.append(float("-inf") if average is None else sign * average)
    return trials[scores.index(max(scores))].trial


def missing(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that have not finished, each once."""
    return list({run.out: run for run in runs if run.results is None}.values())
