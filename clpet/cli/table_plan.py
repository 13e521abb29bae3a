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
    """The runs of a table, with their directories in a folder; of the rows in `kept`, only those that these lack."""

    spec: TableSpec
    output: Path
    kept: Mapping[str, "TableRow"] = field(default_factory=dict)

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
            if row not in self.kept
            for trial in self.spec.trials(row)
        ]

    def final(self, tuning: Sequence[PlannedRun]) -> list[PlannedRun]:
        """The runs on test data: every seed in every order, with the values that were best on validation data."""
        chosen = {
            row: self.kept[row].chosen if row in self.kept else best_trial([run for run in tuning if run.row == row])
            for row in self.spec.rows
        }
        return [
            self.run(row, chosen[row], seed, order)
            for row in self.spec.rows
            for order in range(len(self.spec.orders))
            for seed in self.spec.seeds
            if row not in self.kept or (order, seed) not in self.kept[row].values
        ]

    def untuned(self) -> list[PlannedRun]:
        """The runs on test data without the values of a trial, of rows that have trials: all seeds, the first order."""
        return [
            self.run(row, [], seed)
            for row in self.spec.rows
            if any(self.spec.trials(row))
            for seed in self.spec.seeds
            if row not in self.kept or (0, seed) not in self.kept[row].defaults
        ]

    def keeping(self, folder: Path) -> "TablePlan":
        """This plan without the runs whose figures are in the files of its rows in a folder.

        The file of a row is kept as a whole or not at all: its trials, orders, seeds and signatures must be those of
        this table. Raises ConfigError if a kept row needs further runs, and was made with other versions of packages.
        """
        from clpet.reporting.table_row import TableRow
        from clpet.runs.provenance import versions

        kept, reasons = dict[str, TableRow](), dict[str, str]()
        for name in self.spec.rows:
            if (file := folder / f"{name}.json").is_file():
                row = TableRow.read(file)
                if reason := self._mismatch(row):
                    reasons[name] = reason
                else:
                    kept[name] = row
                    if not self._complete(row):
                        row.check_alike({key: value for key, value in versions().items() if key != "platform"})
        runs = sum(row.num_runs for row in kept.values())
        print(f"kept: {runs} runs of {len(kept)} of {len(self.spec.rows)} rows in {folder}", flush=True)
        for name, reason in reasons.items():
            print(f"not kept: {folder / name}.json, {reason}", flush=True)
        return replace(self, kept=kept)

    def _mismatch(self, row: "TableRow") -> str:
        """Why the figures of a row are not of this table; "" if they are. Seeds are no part of a signature."""
        if [words for words, _ in row.trials] != list(self.spec.trials(row.name)):
            return "which has other trials"
        runs = (*row.values, *row.defaults)
        if any(order >= len(self.spec.orders) or seed not in self.spec.seeds for order, seed in runs):
            return "which has other seeds or orders"
        for trial, signatures in ((row.chosen, row.signatures), ([], row.default_signatures)):
            recorded = {(order, signature) for (order, _), signature in signatures.items()}
            if any(self.run(row.name, trial, self.spec.seeds[0], order).signature != own for order, own in recorded):
                return "whose runs have another configuration"
        return ""

    def _complete(self, row: "TableRow") -> bool:
        """Whether a kept row needs no further run."""
        defaults = len(self.spec.seeds) if row.trials else 0
        return len(row.values) == len(self.spec.orders) * len(self.spec.seeds) and len(row.defaults) == defaults


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
    if not trials:
        return []
    scores = []
    for run in trials:
        if run.results is None:
            raise DataError(f"a trial of {run.row} has not finished: {run.out}")
        sign = 1 if run.results["direction"] == "higher" else -1
        scores.append(float("-inf") if run.average is None else sign * run.average)
    return trials[scores.index(max(scores))].trial


def missing(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that have not finished, each once."""
    return list({run.out: run for run in runs if run.results is None}.values())
