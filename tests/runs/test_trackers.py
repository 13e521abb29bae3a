"""Trackers in addition to wandb hold the numbers of metrics.jsonl and steps.jsonl; a failing one never ends a run."""

import csv
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from clpet.reporting.progress import Display
from clpet.reporting.run_groups import flatten
from clpet.runs import trackers
from clpet.runs.trackers import OtherTracker, TrackerName, Worker, check_installed
from clpet.runtime.signals import EXIT_TEMPFAIL
from tests.conftest import tiny_args

Points = dict[tuple[str, int], float]  # {(name, step): value}
RUN = ["train", "method=dynamic_conpet", "train.select=best", "train.log_every=2"]


def expected(run: Path) -> Points:
    """What a tracker must hold of a run."""
    points: Points = {}
    for line in map(json.loads, (run / "steps.jsonl").read_text().splitlines()):
        for name in ("loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "memory_gb", "validation"):
            if name in line:
                points[f"train/{name}", line["step"]] = line[name]
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        row = line["row"]
        for name, values in line["tasks"].items():
            points[f"score/{name}", row] = values["score"]
            points[f"own_labels/{name}", row] = values["own_labels"]
        points |= {(f"cost/{key}", row): value for key, value in line.get("cost", {}).items()}
        for key in ("average", "whole", "selector_average", "selector_whole"):
            if line.get(key) is not None:
                points[key, row] = line[key]
    return points


def read_csv(run: Path) -> Points:
    with (run / "scalars.csv").open(newline="") as file:
        return {(row["name"], int(row["at"])): float(row["value"]) for row in csv.DictReader(file)}


def read_tensorboard(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [((tag, event.step), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert max(Counter(key for key, _ in points).values()) == 1  # each number once, also after a resume
    return dict(points)


def read_mlflow(run: Path) -> Points:
    """From the files: METRIC holds lines `time value step`."""
    run_id = json.loads((run / "mlflow-run.json").read_text())["run_id"]
    (folder,) = run.parents[2].glob(f"mlruns/*/{run_id}/metrics")
    points: Points = {}
    for file in folder.rglob("*"):
        for line in file.read_text().splitlines() if file.is_file() else ():
            _, value, step, *_ = line.split()
            points[str(file.relative_to(folder)), int(step)] = float(value)
    return points


def only_run(root: Path) -> Path:
    (path,) = root.glob("*/dynamic_conpet/s*/results.json")
    return path.parent


@pytest.mark.parametrize("name", ["csv", pytest.param("tensorboard", marks=pytest.mark.slow)])
def test_files_hold_every_number_once_also_after_a_resume(
    words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    args = [*RUN, *tiny_args(words), f"tracking.also=[{name}]"]
    step, taken = Display.step, []

    def signalling(self, *values) -> None:
        step(self, *values)
        taken.append(1)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", signalling)
        assert clpet(*args).code == EXIT_TEMPFAIL
    assert clpet(*args).code == 0
    run = only_run(tmp_path / "outputs")
    points = expected(run)
    assert len({name for name, _ in points}) > 20
    values = read_csv(run) if name == "csv" else read_tensorboard(run)
    assert values == pytest.approx(points, rel=0 if name == "csv" else 1e-6)  # TensorBoard stores fp32


@pytest.mark.slow
def test_mlflow_holds_every_number(words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert clpet(*RUN, *tiny_args(words), "tracking.also=[mlflow]").code == 0
    run = only_run(tmp_path / "outputs")
    assert read_mlflow(run) == expected(run)


def test_a_missing_package_is_one_line_before_any_work(clpet, words: Path, tmp_path: Path, monkeypatch) -> None:
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    result = clpet(*RUN, *tiny_args(words), "tracking.also=[csv,trackio]")
    message = "clpet: tracking.also=trackio needs a package that is not installed: pip install trackio accelerate"
    assert (result.code, result.err.splitlines()) == (2, [message])
    assert not list(tmp_path.glob("outputs/*/*/*/run.json"))
    check_installed([TrackerName.csv, TrackerName.tensorboard])


def test_an_unknown_tracker_is_one_line(clpet, words: Path) -> None:
    result = clpet(*RUN, *tiny_args(words), "tracking.also=[tensorbord]")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert "tracking.also" in line
    assert "tensorboard" in line


class Failing:
    """A tracker whose disk is full after the start."""

    calls = 0

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict) -> None: ...

    def log(self, values: dict, step: int) -> None:
        self.calls += 1
        raise OSError("no space")

    def finish(self) -> None:
        raise AssertionError("closed after it failed")


def test_a_failing_tracker_ends_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    destination = Failing()
    tracker = OtherTracker(TrackerName.csv, destination, 5)
    tracker.start({})
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": 1.0}, 2)
    tracker.finish(False)
    assert destination.calls == 1
    assert [record.getMessage() for record in caplog.records] == ["csv cannot log (no space); continuing without it"]


def test_a_call_that_never_ends_is_left_behind() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 seconds"):
        Worker().call(lambda: time.sleep(30), 0.05)
    assert time.monotonic() - start < 5


def test_options_are_flattened() -> None:
    config = {"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": None, "f": True}
    assert flatten(config, trackers._number_or_text) == {"a.b": 1, "a.c.d": '[1, "x"]', "e": "null", "f": True}
