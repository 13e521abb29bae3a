"""Trackers in addition to wandb (tracking.also): TensorBoard, MLflow and trackio through accelerate, and a CSV file."""

import csv
import importlib.util
import json
import logging
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol, cast

from clpet.errors import ConfigError
from clpet.escape import spreadsheet
from clpet.records import Json
from clpet.reporting.run_groups import flatten

log = logging.getLogger(__name__)

Scalars = Mapping[str, float]


class TrackerName(Enum):
    """A tracker in addition to wandb."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    trackio = "trackio"
    csv = "csv"


class Destination(Protocol):
    """The part of accelerate's trackers that is used."""

    def start(self) -> object:
        """Opens the tracker."""

    def store_init_configuration(self, values: dict[str, Json]) -> object:
        """Stores the options of the run."""

    def log(self, values: Scalars, step: int) -> object:
        """Stores numbers at a step."""

    def finish(self) -> object:
        """Closes the tracker."""


class Worker:
    """A thread in which all calls of one tracker run: a call that never ends does not hold up the run.

    The thread is always the same one, since MLflow keeps its active run per thread.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[Callable[[], object], queue.SimpleQueue[Exception | None]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            action, outcome = self.calls.get()
            try:
                action()
                outcome.put(None)
            except Exception as error:
                outcome.put(error)

    def call(self, action: Callable[[], object], seconds: float) -> None:
        """Performs an action and waits for its end.

        Raises:
            TimeoutError: the action did not end within `seconds`; it is left behind.
            Exception: whatever the action raised.
        """
        outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.calls.put((action, outcome))
        try:
            error = outcome.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer in {seconds:g} seconds") from None
        if error:
            raise error


class OtherTracker:
    """One tracker of tracking.also. An error or a long wait ends it with a warning, but never the run."""

    def __init__(self, name: TrackerName, destination: Destination, seconds: float) -> None:
        self.name, self.destination, self.seconds = name, destination, seconds
        self.worker: Worker | None = Worker()

    def start(self, config: Mapping[str, Json]) -> None:
        """Opens the tracker and stores the options of the run."""
        options = flatten(config, _number_or_text)
        self._safely("start", self.destination.start)
        self._safely("store the options", lambda: self.destination.store_init_configuration(options))

    def log(self, scalars: Scalars, step: int) -> None:
        """Stores numbers at a step; their names lose the characters that MLflow refuses."""
        values = {re.sub(r"[^\w.\-:/ ]", "_", key, flags=re.ASCII): float(value) for key, value in scalars.items()}
        self._safely("log", lambda: self.destination.log(values, step=step))

    def finish(self, failed: bool) -> None:
        """Closes the tracker; MLflow records whether the run has failed."""
        if failed and self.name is TrackerName.mlflow:
            import mlflow

            self._safely("finish", lambda: mlflow.end_run("FAILED"))
        self._safely("finish", self.destination.finish)

    def _safely(self, what: str, action: Callable[[], object]) -> None:
        if self.worker is None:
            return
        try:
            self.worker.call(action, self.seconds)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s cannot %s (%s); continuing without it", self.name.value, what, reason)
            self.worker = None


class CsvFile:
    """scalars.csv with the columns axis (task or step), at, name and value."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Writes the header."""
        self._write([["axis", "at", "name", "value"]], "w")

    def store_init_configuration(self, values: dict[str, Json]) -> None:
        """Does nothing: the options are in run.json."""

    def log(self, values: Scalars, step: int) -> None:
        """Appends a row for every number."""
        rows = [["step" if name.startswith("train/") else "task", step, name, value] for name, value in values.items()]
        self._write([[spreadsheet(cell) if isinstance(cell, str) else cell for cell in row] for row in rows], "a")

    def finish(self) -> None:
        """Does nothing: every row is on the disk."""

    def _write(self, rows: list[list[Json]], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def check_installed(names: list[TrackerName]) -> None:
    """Raises ConfigError if a package of one of the trackers is missing."""
    for name in names:
        packages = () if name is TrackerName.csv else ("accelerate", name.value)
        if not all(importlib.util.find_spec(package) for package in packages):
            extra = "trackio accelerate" if name is TrackerName.trackio else "'clpet[trackers]'"
            raise ConfigError(f"tracking.also={name.value} needs a package that is not installed: pip install {extra}")


def open_tracker(name: TrackerName, out: Path, project: str, run_name: str, seconds: float) -> OtherTracker:
    """A tracker of a run. TensorBoard and CSV files are in its folder `out`, those of MLflow in OUTPUT_DIR/mlruns."""
    destination: Destination
    if name is TrackerName.csv:
        return OtherTracker(name, CsvFile(out / "scalars.csv"), seconds)
    from accelerate import PartialState
    from accelerate import tracking as library

    PartialState(cpu=True)  # the library's log messages need it; the device is not its business here
    if name is TrackerName.tensorboard:
        shutil.rmtree(out / "tensorboard", ignore_errors=True)  # a resumed run writes all its numbers again
        destination = library.TensorBoardTracker("tensorboard", out)
    elif name is TrackerName.mlflow:
        destination = _mlflow_tracker(out, project, run_name)
    else:
        destination = library.TrackioTracker(project, name=run_name, resume="allow")
    # Only the main rank calls it, so the library need not look for the main process again.
    destination.main_process_only = False  # type: ignore[attr-defined]
    return OtherTracker(name, destination, seconds)


def _mlflow_tracker(out: Path, project: str, run_name: str) -> Destination:
    """MLflow at MLFLOW_TRACKING_URI, else in files; a resumed run continues the run whose id is in mlflow-run.json."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow's database stores need packages that clpet does not
        mlflow.set_tracking_uri((out.parents[2] / "mlruns").as_uri())
    file = out / "mlflow-run.json"
    run_id = json.loads(file.read_text())["run_id"] if file.is_file() else None

    class Resumable(MLflowTracker):  # type: ignore[misc]  # accelerate has no annotations
        """Writes its id as soon as it has one."""

        def start(self) -> None:
            super().start()
            file.write_text(json.dumps({"run_id": self.active_run.info.run_id}))

    return cast(Destination, Resumable(project, run_id=run_id, run_name=run_name))


def _number_or_text(value: Json) -> Json:
    """A value of an option as trackers store it: lists and null as JSON."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
