"""The life of a run directory: finished, interrupted, damaged, locked, and started again."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import tiny_args
from tests.methods.test_all_methods import four_tasks, results


def test_a_finished_run_returns_at_once_and_fresh_starts_over(words: Path, clpet, tmp_path: Path) -> None:
    args = ["train", "method=sequential", *tiny_args(words)]
    assert clpet(*args).code == 0
    (path,) = (tmp_path / "outputs").glob("*/*/s*/results.json")
    first = path.stat().st_mtime_ns
    again = clpet(*args)
    assert again.code == 0
    assert "average" in again.out
    assert path.stat().st_mtime_ns == first
    assert clpet(*args, "fresh=true").code == 0
    assert path.stat().st_mtime_ns != first


def test_a_damaged_checkpoint_is_skipped(words: Path, clpet, tmp_path: Path) -> None:
    args = ["train", "method=replay", *four_tasks(words)]
    assert clpet(*args).code == 0
    (folder,) = (tmp_path / "outputs").glob("*/*/s*")
    expected = json.loads((folder / "results.json").read_text())["scores"]
    (folder / "results.json").unlink()
    newest = max(folder.glob("state/[0-9]*")) / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    again = clpet(*args)
    assert "resuming after 3 of 4" in again.out
    assert json.loads((folder / "results.json").read_text())["scores"] == expected


def test_changed_data_is_not_resumed(tmp_path: Path, clpet) -> None:
    from tests.conftest import write_words

    data = write_words(tmp_path / "data")
    args = ["train", "method=sequential", *tiny_args(data)]
    assert clpet(*args).code == 0
    (path,) = (tmp_path / "outputs").glob("*/*/s*/results.json")
    path.unlink()
    write_words(data, copies=7)
    result = clpet(*args)
    assert result.code == 2
    assert "fresh=true" in result.err


def test_two_processes_do_not_share_a_run_directory(words: Path, clpet, tmp_path: Path) -> None:
    from clpet.runtime.atomic_io import RunLock

    args = ["train", "method=sequential", *tiny_args(words)]
    assert clpet(*args).code == 0
    (folder,) = (tmp_path / "outputs").glob("*/*/s*")
    (folder / "results.json").unlink()
    with RunLock(folder):
        result = clpet(*args)
    assert result.code == 1
    assert "another process" in result.err


@pytest.mark.parametrize("matrix", ["full", "seen", "last"])
def test_evaluation_matrix_selects_the_evaluated_entries(matrix: str, words: Path, clpet, tmp_path: Path) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words), f"evaluation.matrix={matrix}").code == 0
    scores = results(tmp_path / "outputs")["scores"]
    measured = [[value is not None for value in row] for row in scores]
    expected = {
        "full": [[True] * 3] * 4,
        "seen": [[False] * 3, [True, False, False], [True, True, False], [True] * 3],
        "last": [[False] * 3] * 3 + [[True] * 3],
    }
    assert measured == expected[matrix]


@pytest.mark.usefixtures("rendered")
def test_files_missing_after_a_kill_are_written_on_resume(words: Path, clpet, tmp_path: Path, monkeypatch) -> None:
    """results.json is written after the figures, and a truncated line of metrics.jsonl does not matter."""
    from clpet.reporting.plots import run_figures

    args = ["train", "method=sequential", *tiny_args(words)]
    original = run_figures.draw

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_figures, "draw", die)
    assert clpet(*args).code == 130
    (folder,) = tmp_path.glob("outputs/*/*/s*")
    assert not (folder / "results.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"done": 3, "ro')
    monkeypatch.setattr(run_figures, "draw", original)
    assert clpet(*args).code == 0
    assert (folder / "results.json").exists()
    assert (folder / "transfer.png").exists()


def test_fresh_keeps_the_old_run_when_the_new_one_cannot_start(tmp_path: Path, clpet) -> None:
    from tests.conftest import write_words

    data = write_words(tmp_path / "data")
    args = ["train", "method=sequential", *tiny_args(data)]
    assert clpet(*args).code == 0
    (path,) = tmp_path.glob("outputs/*/*/s*/results.json")
    (data / "train.jsonl").rename(data / "gone.txt")
    (data / "validation.jsonl").unlink()
    (data / "test.jsonl").unlink()
    assert clpet(*args, "fresh=true").code == 2
    assert path.exists()


def test_a_diverging_loss_stops_the_task_and_says_where(words: Path, clpet) -> None:
    result = clpet("train", "method=sequential", *tiny_args(words), "train.lr=1e30")
    assert result.code == 1
    assert "the loss of task 1" in result.err
    assert "train.lr" in result.err
    assert os.linesep.join(result.err.splitlines()[-1:]).count("\n") == 0
