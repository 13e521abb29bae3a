"""A row of a table of results: the figures of its runs, and the JSON file that is committed of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from clpet.config.table_spec import TableSpec
from clpet.errors import ConfigError
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Json, Metrics, Results
from clpet.reporting.planned_run import PlannedRun
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_metrics import MeanStd, mean_and_std
from clpet.reporting.significance import row_scores
from clpet.reporting.table_statistics import (
    Answers,
    Paired,
    Variances,
    one_sample,
    over_examples,
    paired_difference,
    variances,
)
from clpet.runtime.hardware import NOT_RECORDED
from clpet.runtime.untrusted_json import as_data_error

COST_COLUMNS = (
    "seconds", "evaluation_seconds", "forward_examples", "flops", "trained_parameters", "stored_bytes", "replay_bytes"
)  # fmt: skip


class TrialRecord(TypedDict):
    """A trial in a row's file: its words and its final average on validation data."""

    words: list[str]
    validation: float | None


class AnswerRecord(TypedDict):
    """Which test examples of every task a run answers right at the end: their number and a bit for each, as hex."""

    order: int
    seed: int
    tasks: dict[str, str]


class RowRecord(TypedDict):
    """What is committed of a row."""

    row: str
    words: list[str]
    chosen: list[str]
    lower_is_better: bool
    task_given: bool  # the task of a test example is given
    all_at_once: bool  # all tasks are learned together
    num_runs: int  # trials and runs with default values included
    total_seconds: float  # of training and evaluation in all these runs
    trials: list[TrialRecord]
    runs: list[Metrics]
    signatures: list[str]
    default_runs: list[Metrics]
    default_signatures: list[str]
    answers: list[AnswerRecord]
    default_answers: list[AnswerRecord]
    versions: dict[str, Json]
    host: NotRequired[dict[str, Json]]  # what rounding depends on, of its first run
    inputs: NotRequired[dict[str, str]]  # fingerprints of weights and data, of its first run


@dataclass
class TableRow:
    """A row: the figures of all its runs by (order, seed), and the trials that its options were chosen by.

    `defaults` has those of the runs without tuning, in the first order.
    """

    name: str
    chosen: list[str]
    trials: list[tuple[list[str], float | None]]
    values: dict[tuple[int, int], Metrics] = field(default_factory=dict)
    signatures: dict[tuple[int, int], str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    versions: dict[str, Json] = field(default_factory=dict)  # of the packages in its first run
    host: dict[str, Json] = field(default_factory=dict)  # of its first run
    inputs: dict[str, str] = field(default_factory=dict)  # of its first run
    defaults: dict[tuple[int, int], Metrics] = field(default_factory=dict)
    default_signatures: dict[tuple[int, int], str] = field(default_factory=dict)
    lower: bool = False
    task_given: bool = False
    all_at_once: bool = False
    num_runs: int = 0
    total_seconds: float = 0
    answers: dict[tuple[int, int], dict[str, np.ndarray]] = field(default_factory=dict)
    default_answers: dict[tuple[int, int], dict[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        spec: TableSpec,
        tuning: Sequence[PlannedRun],
        runs: Sequence[PlannedRun],
        defaults: Sequence[PlannedRun],
    ) -> "TableRow":
        """The row of finished runs: its trials, its runs with the chosen values, and those without any."""
        trials = [(run.trial, run.average) for run in tuning]
        chosen = runs[0].trial if runs else []
        row = cls(name, chosen, trials, words=[*spec.words, *spec.rows[name].words])
        for run in runs:
            if results := run.results:
                row.lower = results["direction"] == "lower"
                row.task_given = results["task_id_at_test"] or TransferMatrix.from_json(results).separate
                row.all_at_once = len(results["cost"]) < len(results["tasks"])
                row.values[run.order, run.seed] = measured(results)
                row.signatures[run.order, run.seed] = run.signature
                row.answers |= right_answers(run, results)
        for run in defaults:
            if results := run.results:
                row.defaults[run.order, run.seed] = measured(results)
                row.default_signatures[run.order, run.seed] = run.signature
                row.default_answers |= right_answers(run, results)
        row._describe([*runs, *defaults])
        every = {run.out: run.results for run in (*tuning, *runs, *defaults)}
        finished = [measured(results) for results in every.values() if results]
        row.num_runs = len(finished)
        row.total_seconds = sum((run["seconds"] or 0) + (run["evaluation_seconds"] or 0) for run in finished)
        return row

    def _describe(self, runs: Sequence[PlannedRun]) -> None:
        """Records versions, host and inputs of the first finished run; its data have the order of the first order."""
        first = next(((run, results) for run in runs if (results := run.results)), None)
        if first is not None:
            run, results = first
            self.versions = _without(cast(dict[str, Json], results.get("versions", {})), "platform")
            self.host, inputs = run.host, results.get("inputs", {})
            self.inputs = {name: value for name, value in inputs.items() if name != "data" or run.order == 0}

    @classmethod
    def read(cls, file: Path) -> "TableRow":
        """The row of a file that `write` made. Raises DataError."""
        with as_data_error(f"{file} cannot be read"):
            record = cast(RowRecord, json.loads(file.read_text()))
            trials = [(trial["words"], trial["validation"]) for trial in record["trials"]]
            runs, defaults = _by_run(record["runs"]), _by_run(record["default_runs"])
            signatures = dict(zip(runs, record["signatures"], strict=True))
            default_signatures = dict(zip(defaults, record["default_signatures"], strict=True))
            return cls(
                record["row"], record["chosen"], trials, runs, signatures, record["words"], dict(record["versions"]),
                dict(record.get("host", {})), dict(record.get("inputs", {})), defaults, default_signatures,
                record["lower_is_better"], record["task_given"], record["all_at_once"], record["num_runs"],
                record["total_seconds"], _unpacked(record["answers"]), _unpacked(record["default_answers"]),
            )  # fmt: skip

    def to_json(self) -> RowRecord:
        """What is committed of the row."""
        return {
            "row": self.name, "words": self.words, "chosen": self.chosen, "lower_is_better": self.lower,
            "task_given": self.task_given, "all_at_once": self.all_at_once, "num_runs": self.num_runs,
            "total_seconds": round(self.total_seconds, 1),
            "trials": [{"words": words, "validation": score} for words, score in self.trials],
            "runs": _as_list(self.values), "signatures": _in_order(self.signatures, self.values),
            "default_runs": _as_list(self.defaults),
            "default_signatures": _in_order(self.default_signatures, self.defaults),
            "answers": _packed(self.answers), "default_answers": _packed(self.default_answers),
            "versions": self.versions, "host": self.host, "inputs": self.inputs,
        }  # fmt: skip

    def check_alike(self, other: Mapping[str, Json]) -> None:
        """Raises ConfigError if the versions, machine or data of `other` runs are not those of this row."""
        recorded = {**self.versions, **(NOT_RECORDED if self.host else {}), **self.host, **self.inputs}
        other = {**(NOT_RECORDED if "device" in other else {}), **other}
        shared = [key for key in sorted(recorded.keys() & other.keys()) if key != "name"]
        if different := [f"{key} ({recorded[key]}, now {other[key]})" for key in shared if recorded[key] != other[key]]:
            raise ConfigError(
                f"row {self.name}: runs in its file and further ones differ in {', '.join(different)}: make them all "
                f"again with --only {self.name}, without --reuse"
            )

    def combined(self, more: "TableRow") -> "TableRow":
        """This row with further runs, of other seeds or orders. Raises ConfigError if they were made differently."""
        self.check_alike(more.versions | more.host | more.inputs)
        return replace(
            self,
            values=self.values | more.values,
            signatures=self.signatures | more.signatures,
            words=more.words,
            defaults=self.defaults | more.defaults,
            default_signatures=self.default_signatures | more.default_signatures,
            num_runs=self.num_runs + more.num_runs,
            total_seconds=self.total_seconds + more.total_seconds,
            answers=self.answers | more.answers,
            default_answers=self.default_answers | more.default_answers,
        )

    def mean(self, name: str) -> MeanStd | None:
        """Mean and standard deviation of a figure over seeds and orders."""
        return mean_and_std([values.get(name) for values in self.values.values()])

    def default_mean(self) -> MeanStd | None:
        """Mean final average without tuning, in the first order."""
        return mean_and_std([values["average"] for values in self.defaults.values()])

    def tuned_mean(self) -> MeanStd | None:
        """Mean final average of the runs with the chosen values that `default_mean` has without tuning."""
        return mean_and_std([self.values[key]["average"] for key in self.defaults if key in self.values])

    def scores(self, name: str = "average") -> dict[tuple[int, int], float]:
        """A figure of every run that has it."""
        return _scores(self.values, name)

    def gain(self) -> Paired | None:
        """How much better the chosen values are than the defaults, over the runs that both have."""
        if gain := over_examples(self.answers, self.default_answers):
            return gain
        tuned, default = self.scores(), _scores(self.defaults, "average")
        return paired_difference(default, tuned) if self.lower else paired_difference(tuned, default)

    def interval(self) -> Paired | None:
        """The final average with its interval, over test examples and runs where answers are known, else over runs."""
        scores = self.scores()
        if len(scores) < len(self.values) or not scores:
            return None
        return over_examples(self.answers) or one_sample(list(scores.values()))

    def minus(self, other: "TableRow", metric: str = "average") -> Paired | None:
        """The difference to another row; in the final average over test examples too, if answers are known."""
        if metric == "average" and (difference := over_examples(self.answers, other.answers)):
            return difference
        return paired_difference(self.scores(metric), other.scores(metric))

    def variances(self) -> Variances | None:
        """What orders and seeds contribute to the variance of the final average."""
        return variances(self.scores())

    @property
    def is_bound(self) -> bool:
        """Whether it learns or answers under easier conditions than the others."""
        return self.task_given or self.all_at_once


def _without(record: dict[str, Json], name: str) -> dict[str, Json]:
    return {key: value for key, value in record.items() if key != name}


def _scores(values: dict[tuple[int, int], Metrics], name: str) -> dict[tuple[int, int], float]:
    return {key: value for key, figures in values.items() if (value := figures.get(name)) is not None}


def right_answers(run: PlannedRun, results: Results) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """{(order, seed): {task: [test examples] 0 or 1}} after the last task; {} if they were not saved or are shares."""
    scores = row_scores(run.out, len(results["tasks"]), results["tasks"])
    if not scores or any(not np.isin(values, (0, 1)).all() or not values.size for values in scores.values()):
        return {}
    return {(run.order, run.seed): scores}


def _packed(answers: Answers) -> list[AnswerRecord]:
    return [
        {
            "order": order,
            "seed": seed,
            "tasks": {
                task: f"{len(values)}:{np.packbits(values.astype(bool)).tobytes().hex()}"
                for task, values in tasks.items()
            },
        }
        for (order, seed), tasks in sorted(answers.items())
    ]


def _unpacked(records: list[AnswerRecord]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    return {
        (record["order"], record["seed"]): {task: _bits(text) for task, text in record["tasks"].items()}
        for record in records
    }


def _bits(text: str) -> np.ndarray:
    count, _, digits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count)).astype(float)


def _as_list(values: dict[tuple[int, int], Metrics]) -> list[Metrics]:
    return [{"order": order, "seed": seed, **figures} for (order, seed), figures in sorted(values.items())]


def _in_order(signatures: dict[tuple[int, int], str], runs: dict[tuple[int, int], Metrics]) -> list[str]:
    return [signatures.get(run, "") for run in sorted(runs)]


def _by_run(runs: list[Metrics]) -> dict[tuple[int, int], Metrics]:
    return {(int(run.pop("order") or 0), int(run.pop("seed") or 0)): run for run in runs}


def measured(results: Results) -> Metrics:
    """The figures of a run that a table keeps."""
    matrix, task_matrix = TransferMatrix.from_json(results), TransferMatrix.from_json(results, results["task_scores"])
    figures: Metrics = {
        "average": matrix.final(),
        "task_average": None if matrix.direction == "lower" else task_matrix.final(),
        "bwt": matrix.backward_transfer(),
        "forgetting": matrix.forgetting(),
    }
    return figures | {name: COSTS[name].value(results) for name in COST_COLUMNS}
