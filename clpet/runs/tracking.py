"""Reports a running experiment: to the screen, to metrics.jsonl and steps.jsonl, to wandb, and to other trackers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from clpet.escape import inline
from clpet.evaluation.evaluator import Evaluation
from clpet.metrics.transfer_matrix import on_split
from clpet.records import Json, ProgressLine, Results
from clpet.reporting.progress import Display
from clpet.reporting.step_lines import STEP_LOG, StepLine, read_steps
from clpet.reporting.tables import matrix_table, summary_line
from clpet.runs import line_files, provenance
from clpet.runs.trackers import OtherTracker, Scalars, TrackerName, open_tracker
from clpet.runs.tracking_options import Mode, Tracking
from clpet.runs.wandb_run import STEP_SCALARS, WandbRun
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState

REWRITTEN = (TrackerName.tensorboard, TrackerName.csv)  # their files are written again when a run resumes
UPLOADED = ("results.json", "adapters", "heads")  # as wandb's artifact


class Tracker:
    """Reports one run, on the main rank only. A context manager; `display` shows the progress."""

    def __init__(
        self, settings: Tracking, out: Path, display: Display, config: dict[str, Json], identity: dict[str, str]
    ) -> None:
        self.settings, self.out, self.display = settings, out, display
        self.config, self.identity = config, identity
        self.wandb: WandbRun | None = None
        self.others: list[OtherTracker] = []
        self.address: str | None = None  # the line with the address of the run on wandb, known at its end

    def __enter__(self) -> "Tracker":
        if self.settings.mode is not Mode.off and get_world().is_main:
            method, seed, signature = self._option("method", "name"), self.identity["seed"], self.identity["signature"]
            group = f"{self._option('benchmark', 'name')}/{method}/{signature}"
            names = {"name": f"{method}-s{seed}", "group": group, "job_type": method}
            self.wandb = WandbRun(self.settings, self.out, names, self._key(""))
            self.wandb.start(self._record(), f"{signature}-s{seed}")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.display.close()
        failed = kind is not None
        for tracker in self.others:
            tracker.finish(failed)
        if self.wandb:
            self.address = self.wandb.finish(failed)
            if failed and self.address:
                self.display.print(self.address)

    def begin(self, state: RunState | None) -> None:
        """Opens the other trackers, and removes the lines of files that a run resumed at `state` will write again."""
        if not get_world().is_main:
            return
        line_files.drop_repeated(self.out, state)
        project = self.settings.project or os.environ.get("WANDB_PROJECT") or "clpet"
        run_name = self.settings.run_name or f"{self._option('method', 'name')}-s{self.identity['seed']}"
        for name in self.settings.also:
            tracker = open_tracker(name, self.out, project, run_name, self.settings.finish_timeout)
            tracker.start(self._record())
            self.others.append(tracker)
            if name in REWRITTEN:
                self._write_again(tracker)

    def _write_again(self, tracker: OtherTracker) -> None:
        """Passes the lines of the run so far to a tracker with an empty file."""
        for line in line_files.read(self.out / line_files.METRICS):
            tracker.log(self._row_scalars(cast(ProgressLine, line)), cast(ProgressLine, line)["row"])
        for step_line in read_steps(self.out):
            tracker.log(step_scalars(step_line), step_line["step"])

    def log_steps(self, lines: Sequence[StepLine]) -> None:
        """Reports lines of the step log: to steps.jsonl, and as scalars over the axis `step` to the trackers."""
        if not get_world().is_main:
            return
        line_files.append(self.out / STEP_LOG, lines)
        if self.wandb:
            self.wandb.log([{"step": line["step"], **step_scalars(line)} for line in lines])
        for tracker in self.others:
            for line in lines:
                tracker.log(step_scalars(line), line["step"])

    def log_row(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        """Reports row `row` of the matrix: a line of metrics.jsonl, a table on the screen, scalars for trackers."""
        if not get_world().is_main:
            return
        names, matrix = state.matrix.tasks, state.matrix
        tasks = {
            names[index]: {"score": score.value, "correct": score.correct, "total": score.total,
                           "own_labels": evaluation.per_task[index].value}
            for index, score in evaluation.seen.items()
        }  # fmt: skip
        line: dict[str, Json] = {"done": state.done, "row": row, "split": self.split, "tasks": tasks}
        line |= evaluation.diagnostics
        line |= {"average": matrix.average(row, row), "whole": matrix.micro_average(row, row)} if row else {}
        line |= {"cost": cast(Mapping[str, Json], state.costs[-1])} if state.costs else {}
        self.log_line(cast(ProgressLine, line))
        self._show(state, row, evaluation)

    def log_line(self, line: ProgressLine) -> None:
        """Reports a line of metrics.jsonl: to this file, and its numbers over the axis `task` to the trackers."""
        line_files.append(self.out / line_files.METRICS, [cast(Mapping[str, Json], line)])
        scalars, row = self._row_scalars(line), line["row"]
        if self.wandb:
            self.wandb.log([{"task": row, **scalars}])
        for tracker in self.others:
            tracker.log(scalars, row)

    def _row_scalars(self, line: ProgressLine) -> Scalars:
        """The numbers of a line of metrics.jsonl by their names in a tracker."""
        scalars: dict[str, Json] = {f"score/{name}": value["score"] for name, value in line["tasks"].items()}
        scalars |= {f"own_labels/{name}": value["own_labels"] for name, value in line["tasks"].items()}
        figures = cast(Mapping[str, Json], line)
        scalars |= {
            key: value for key, value in figures.items() if key not in ("done", "row", "split", "tasks", "cost")
        }
        scalars = {self._key(inline(key)): value for key, value in scalars.items()}
        scalars |= {f"cost/{key}": value for key, value in cast(Mapping[str, Json], figures.get("cost", {})).items()}
        return {key: value for key, value in scalars.items() if isinstance(value, int | float)}

    def log_results(self, results: Results, figures: list[Path]) -> None:
        """Writes the final matrices, the figures and the summary metrics to wandb."""
        if self.wandb:
            self.wandb.log_results(results, figures)

    def upload(self) -> None:
        """With tracking.artifacts=true, uploads the results and the trained weights to wandb."""
        if self.wandb and self.settings.artifacts:
            self.wandb.upload([self.out / name for name in UPLOADED])

    @property
    def split(self) -> str:
        """The split that the matrix is measured on."""
        return self._option("evaluation", "split")

    def _option(self, group: str, key: str) -> str:
        return str(cast(Mapping[str, Json], self.config[group])[key])

    def _key(self, name: str) -> str:
        """The name of a metric in a tracker. A prefix keeps metrics on validation apart from those on test."""
        return name if self.split == "test" else f"{self.split}/{name}"

    def _record(self) -> dict[str, Json]:
        """The options of the run, and what they do not say: versions, and fingerprints of code, data and weights."""
        run: dict[str, Json] = {
            "versions": provenance.versions(),
            "git": provenance.git_revision(),
            "out": str(self.out),
        }
        return {**self.config, "run": {**run, "inputs": self.identity}}

    def _show(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        self.display.print()
        self.display.print(matrix_table(state.matrix, row))
        if row:
            overall = {key: value for key, value in evaluation.diagnostics.items() if "/" not in key}
            extra = "".join(f" · {key.replace('_', ' ')} {value:.2f}" for key, value in overall.items())
            self.display.print(summary_line(state.matrix, row) + extra + on_split("", self.split))
        self.display.print()


def step_scalars(line: StepLine) -> Scalars:
    """The numbers of a line of the step log by their names in a tracker, without those that are None."""
    values = cast(Mapping[str, float | None], line)
    return {f"train/{name}": value for name in STEP_SCALARS if (value := values.get(name)) is not None}
