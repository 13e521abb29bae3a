"""An objective of a user is one file and one YAML in a folder of their own; the name of none is compared."""

import ast
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

import clpet as package
from clpet.cli.options import options
from tests.conftest import tiny_args


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in, copied to a folder outside the project; one folder, since Python keeps imported modules."""
    return Path(shutil.copytree(Path(__file__).parent / "plugins", tmp_path_factory.mktemp("plug_in") / "mine"))


def test_it_is_learned_recorded_resumed_and_evaluated(folder: Path, clpet, words: Path, tmp_path: Path) -> None:
    args = ["--config-dir", folder, *tiny_args(words), "model=tiny_llama", "method=ewc", "objective=reversed_answers",
            "objective.keep=1", "benchmark.max_target=8", "train.epochs=1"]  # fmt: skip
    answer = clpet("train", *args)
    assert answer.code == 0, answer.err
    (run,) = tmp_path.glob("outputs/files/ewc/*")
    results = json.loads((run / "results.json").read_text())
    assert (results["objective"], results["softmax"], results["direction"]) == ("reversed_answers", None, "higher")
    labels = pyarrow.parquet.read_table(run / "predictions" / "after-003.parquet")["label"].to_pylist()
    assert {"aelpp", "prae"} <= set(labels)
    assert "already finished" in clpet("train", *args).out
    shown = clpet("eval", run, "--allow-plugins", "--config-dir", folder)
    assert shown.code == 0, shown.err
    assert shown.out.count("equal") == 3
    assert "score in %" in answer.out


def test_a_method_that_needs_labels_refuses_it_by_its_capabilities(folder: Path, clpet, words: Path) -> None:
    args = ["train", "--config-dir", folder, *tiny_args(words), "model=tiny_llama", "objective=reversed_answers"]
    for more, message in {
        "method=crl": "method=crl does not support objective=reversed_answers: it needs labels",
        "method=dapt": "method=dapt does not support objective=reversed_answers: it needs plain text",
        "evaluation.stride=8": "evaluation.stride is for language_modeling; objective=reversed_answers does not use it",
        "benchmark.classes_per_task=2": "must be null with objective=reversed_answers",
        "objective.kep=1": "unknown key objective.kep; did you mean objective.keep?",
    }.items():
        method = () if more.startswith("method") else ("method=sequential",)
        answer = clpet(*args, *method, more)
        assert (answer.code, message in answer.err) == (2, True), answer.err


def test_names_of_objectives_are_compared_nowhere_but_where_old_runs_are_read() -> None:
    """Capabilities are asked for instead: a new objective works without a change of another file."""
    names, found = set(options("objective")), []
    for path in Path(package.__file__).parent.rglob("*.py"):
        if path.name in ("recorded_objective.py", "renamed.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = [value.value for value in ast.walk(node) if isinstance(value, ast.Constant)]
                found += [f"{path.name}:{node.lineno}" for value in values if isinstance(value, str) and value in names]
    assert found == []
