"""Metrics on validation data, which settings are chosen by, are never mistaken for metrics on test data."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clpet.cli import main
from clpet.config.schema import Split
from clpet.evaluation.evaluator import Evaluator
from clpet.reporting.run_metrics import outcome
from clpet.runs.tracking import Tracker
from tests.conftest import domain_args, set_up, tiny_args, write_words


@pytest.fixture(scope="module")
def runs(words: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same run measured on test and on validation: their folders, and the output folder of both."""
    from hydra.core.global_hydra import GlobalHydra

    folders = {}
    for split in ("test", "validation"):
        out = tmp_path_factory.getbasetemp() / "measured"
        GlobalHydra.instance().clear()
        options = ["method=sequential", *tiny_args(words), f"output_dir={out}", f"evaluation.split={split}"]
        assert main.main_with_errors(["train", *options]) == 0
        (folders[split],) = [path for path in out.glob("*/*/s*") if path not in folders.values()]
    GlobalHydra.instance().clear()
    return SimpleNamespace(out=out, **folders)


def results(run: Path) -> dict:
    """The contents of results.json."""
    return json.loads((run / "results.json").read_text())


def test_the_matrix_is_measured_on_validation(runs: SimpleNamespace) -> None:
    """Both have the same weights. The last row is what the test run recorded on validation, and what a sweep returns."""
    test, validation = results(runs.test), results(runs.validation)
    assert [run["split"] for run in (test, validation)] == ["test", "validation"]
    assert validation["total"][-1] == [8, 8, 8]  # 4 labels of 2 examples; as many are in test
    assert validation["test_sets"].keys() == test["test_sets"].keys()
    assert all(validation["test_sets"][task] != test["test_sets"][task] for task in test["tasks"])
    assert np.isfinite(np.array(validation["scores"], float)).all()
    own_average = np.mean(validation["task_scores"][-1])
    assert test["validation"] == pytest.approx({"average": validation["average"], "own_average": own_average})
    assert "validation" not in validation
    assert outcome(runs.test) == outcome(runs.validation) == pytest.approx(validation["average"])
    for name in ("adapters/default/adapter_model.safetensors", "heads/default.safetensors"):
        assert (runs.test / name).read_bytes() == (runs.validation / name).read_bytes()


def test_every_output_names_the_split(runs: SimpleNamespace, clpet) -> None:
    assert "sequential on files (validation) with tiny" in clpet("show", runs.validation).out
    assert "average on validation after the last task: " in clpet("show", runs.test).out
    assert "(validation)" not in clpet("show", runs.test).out
    again = clpet("eval", runs.validation)
    assert (again.code, "sequential on files (validation) after 3 of 3 tasks" in again.out) == (0, True)
    assert (runs.validation / "transfer.csv").read_text().startswith("after (validation),fruit,")
    rows = [json.loads(line)["split"] for line in (runs.validation / "metrics.jsonl").read_text().splitlines()]
    assert rows == ["validation"] * 4
    listed = [line.split()[5] for line in clpet("runs", runs.out).out.splitlines()]
    assert sorted(listed) == ["split", "test", "validation"]
    compared = clpet("runs", runs.out, "--compare", "method", "--metrics", "average").out
    assert compared.count("measured on validation") == 1
    assert compared.count("sequential") == 2
    log = (runs.validation / "train.log").read_text()
    assert "on 3 seen tasks (validation)" in log


def test_a_finished_run_is_shown_with_its_split(runs: SimpleNamespace, words: Path, clpet) -> None:
    again = clpet(
        "train", "method=sequential", *tiny_args(words), f"output_dir={runs.out}", "evaluation.split=validation"
    )
    assert "sequential on files (validation), seed 0: accuracy" in again.out
    again = clpet("train", "method=sequential", *tiny_args(words), f"output_dir={runs.out}")
    assert "validation_average" in again.out


def test_names_on_wandb_tell_the_splits_apart(tmp_path: Path) -> None:
    keys = [
        Tracker(None, tmp_path, None, {"evaluation": {"split": split}}, {})._key("average")
        for split in ("test", "validation")
    ]  # type: ignore[arg-type]
    assert keys == ["average", "validation/average"]


def test_evaluating_validation_does_not_change_test_predictions(make) -> None:
    """Also for a method that caches outputs before an evaluation."""
    run = make("method=dynamic_conpet")
    run.learn(0)
    evaluations = [
        Evaluator(run.benchmark, run.data, split)(run.method, 1, [0, 1, 2]) for split in ("test", "validation", "test")
    ]
    for name in ("prediction", "own_prediction", "score"):
        np.testing.assert_array_equal(evaluations[0].rows[name], evaluations[2].rows[name])
    assert len(evaluations[1].rows["score"]) == 24
    meter = run.method.objective.meter.cost
    assert (meter.evaluated_examples > 0, meter.validated_examples > 0) == (True, True)


def test_plain_text_is_windowed_equally_on_validation_and_test(prose: Path) -> None:
    """Windows of both splits start, overlap and count bytes in the same way."""
    args = ["method=sequential", "evaluation.split=validation", "evaluation.bos=true", "evaluation.stride=8"]
    run = set_up(domain_args(prose, *args))
    assert run.config.evaluation.split is Split.validation
    for split in ("validation", "test"):
        pool = run.data.split(split)
        texts = [example.text for example in run.benchmark.tasks[0].split(split)]
        assert sum(pool.bytes(row) for row in pool.rows_of(0)) == pytest.approx(
            sum(len(text.encode()) for text in texts), abs=1
        )
    evaluation = Evaluator(run.benchmark, run.data, "validation")(run.method, 0, [0])
    assert evaluation.diagnostics["bits_per_byte/birds"] > 0


def test_tasks_without_validation_are_refused(clpet, words: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(words, tmp_path / "words"))
    (folder / "validation.jsonl").unlink()
    args = [*tiny_args(folder), "method=sequential", "benchmark.validation_share=0"]
    answer = clpet("train", *args, "evaluation.split=validation")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "evaluation.split=validation, but task fruit has no validation examples" in answer.err
    assert clpet("train", *args, "train.epochs=1").code == 0
    (file,) = tmp_path.glob("outputs/*/*/s*/results.json")
    assert "validation" not in results(file.parent)
    assert outcome(file.parent) == results(file.parent)["average"]


def test_max_validation_limits_every_task(tmp_path: Path) -> None:
    from clpet.data.sources import Table

    folder = write_words(tmp_path)
    for most, train, count in ((3, None, 3), (None, 20, 4), (None, None, 8), (6, 20, 6)):
        tasks = Table(name="files", task="task", max_validation=most, max_train=train).load(str(folder)).tasks
        assert [len(task.validation) for task in tasks] == [count] * 3
