"""`clpet init`: a benchmark YAML that works as written, a method whose test passes, and nothing overwritten."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_data_survey import (
    LIMITS,
    SEQUENTIAL,
    cells,
    class_folders,
    conversations,
    files_per_task,
    latin_1,
    prompts,
    task_folders,
    texts,
    topic_rows,
)
from tests.data.test_tabular_files import put


def test_a_benchmark_yaml_works_as_written(tmp_path: Path, clpet) -> None:
    put(tmp_path / "in" / "My Shop.csv", cells(topic_rows(text="body", label="area"), ";"))
    done = clpet("init", "in", "--name", "shop", "label=area", *SEQUENTIAL)
    assert done.code == 0, done.err
    assert "separated by semicolons" in done.out
    command = shlex.split(done.out.splitlines()[-1])
    assert command == ["clpet", "train", "--config-dir", "in", "benchmark=shop", *SEQUENTIAL]
    text = (tmp_path / "in" / "benchmark" / "shop.yaml").read_text()
    assert "\n# The data in in. clpet train --config-dir in benchmark=shop model=tiny" in text
    assert '  text: "body"  # text column' in text
    assert "  classes_per_task: 2  # labels per task" in text
    shown = clpet("data", "shop", "--config-dir", "in", *SEQUENTIAL)
    assert "task02     32" in shown.out, shown.out + shown.err
    assert "not read" not in shown.out
    os.environ.pop("CLPET_CONFIG_DIR")  # a command of its own does not know the folder
    again = clpet("init", "in", "--name", "shop")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "shop.yaml exists already and is not overwritten" in again.err
    assert (tmp_path / "in" / "benchmark" / "shop.yaml").read_text() == text
    assert "The data in in. clpet train" in clpet("list", "benchmarks", "--config-dir", "in").out


@pytest.mark.slow
@pytest.mark.parametrize(
    "maker",
    [latin_1, task_folders, files_per_task, class_folders, prompts, texts, conversations],
    ids=lambda maker: maker.__name__,
)
def test_a_benchmark_yaml_of_every_kind_can_be_read(maker, tmp_path: Path, clpet) -> None:
    (tmp_path / "my data").mkdir()
    path, words, _ = maker(tmp_path / "my data")
    done = clpet("init", path, "--config-dir", "mine", "--name", "own", *words)
    assert done.code == 0, done.err
    trained = clpet(*shlex.split(done.out.splitlines()[-1])[1:], *LIMITS)
    assert trained.code == 0, trained.err
    assert list(tmp_path.glob("outputs/own/*/s0-*/results.json"))
    for line in range(2):  # the YAML that lies next to its data changes nothing
        shown = clpet("data", "own", "--config-dir", "mine", *words)
        assert shown.code == 0, (line, shown.err, (tmp_path / "mine" / "benchmark" / "own.yaml").read_text())
        put(tmp_path / "my data" / "benchmark" / "x.yaml", "")


@pytest.mark.parametrize(("words", "expected"), [
    (["nowhere"], "nowhere does not exist"),
    (["a.csv", "--name", "files"], "the benchmark files exists already"),
    (["a.csv", "--name", "a b"], "must consist of letters"),
    (["x", "--method", "Mine"], "must be a Python name in lower case"),
    (["x", "--method", "ewc"], "the method ewc exists already"),
    (["x", "--method", "json"], "a Python module is called json"),
    (["x", "model=tiny", "--method", "mine"], "takes no other options"),
])  # fmt: skip
def test_refusals(words: list[str], expected: str, tmp_path: Path, clpet) -> None:
    put(tmp_path / "a.csv", cells(topic_rows(), ","))
    result = clpet("init", *words)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert expected in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_an_existing_file_of_a_method_is_kept(tmp_path: Path, clpet) -> None:
    put(tmp_path / "code" / "test_mine.py", "mine")
    result = clpet("init", "code", "--method", "mine")
    assert result.code == 2
    assert "test_mine.py exists already" in result.err
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["test_mine.py"]


@pytest.mark.slow
def test_the_test_of_a_new_method_passes(tmp_path: Path, clpet) -> None:
    done = clpet("init", "code", "--method", "near_old")
    assert done.code == 0, done.err
    command = shlex.split(done.out.splitlines()[-2])
    assert command == ["python", "-m", "pytest", "code/test_near_old.py"]
    subprocess.run([sys.executable, *command[1:], "-q"], cwd=tmp_path, check=True)
    assert "near_old" in clpet("list", "methods", "--config-dir", "code").out
