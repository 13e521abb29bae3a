"""Parallel runs of a sweep (hardware.parallel_runs)."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clpet.cli import parallel_runs
from clpet.runtime.signals import EXIT_TEMPFAIL
from tests.conftest import tiny_args

# Replaces `python -m clpet train`: records its arguments; seed 1 fails, seed 2 is killed, 3 waits for a signal.
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
(seed,) = (word[5:] for word in words if word.startswith("seed="))
noted = {"words": words, "threads": os.environ.get("OMP_NUM_THREADS")}
pathlib.Path(f"noted-{seed}").write_text(json.dumps(noted))
print("after  on  a table")
print("average 50.00 · whole 50.00 on 1 seen task", flush=True)
if seed == "1":
    print("WARNING: odd data", file=sys.stderr)
    print("clpet: no such file", file=sys.stderr)
    sys.exit(2)
if seed == "2":
    os.kill(os.getpid(), signal.SIGKILL)
if seed == "3":
    def save(*_):
        print("clpet: saved")
        sys.exit(75)
    signal.signal(signal.SIGINT, save)
    pathlib.Path(f"waiting-{os.getpid()}").touch()
    time.sleep(60)
"""


@pytest.fixture
def fake_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_runs, "CLPET", [sys.executable, "-c", FAKE_TRAIN])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def sweep(words: Path, *more: str) -> list[str]:
    args = [word for word in tiny_args(words, "method=sequential") if not word.startswith("hardware.threads")]
    return ["train", "-m", "hardware.parallel_runs=2", *args, *more]


@pytest.mark.usefixtures("fake_train")
def test_runs_get_their_words_and_cores_and_a_failing_one_does_not_stop_the_others(
    clpet, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    result = clpet(*sweep(words, "seed=1,2,0,0,4", "hydra.sweep.dir=${output_dir}", "hydra.verbose=false"))
    assert (result.code, result.err.splitlines()) == (
        2, ["clpet: seed=1: no such file", "clpet: seed=2: ended by SIGKILL"]
    )  # fmt: skip
    noted = {path.name[-1]: json.loads(path.read_text()) for path in tmp_path.glob("noted-*")}
    assert noted.keys() == {"0", "1", "2", "4"}
    assert {note["threads"] for note in noted.values()} == {"3"}
    assert "hydra.verbose=false" in noted["0"]["words"]
    assert not any(word == "-m" or word.startswith("hydra.sweep") for word in noted["0"]["words"])
    head, *lines = result.out.splitlines()
    assert head == "sweep of 5 runs; each writes its progress to train.log in its folder"
    assert "[1] seed=1: WARNING: odd data" in lines
    assert len([line for line in lines if re.match(r"run \d of 4.* · seed=[0124]: ", line)]) == 4
    (folder,) = tmp_path.glob("outputs/*/*/s1-*")
    assert f"failed seed=1: no such file; log {folder / 'train.log'}" in lines


@pytest.mark.usefixtures("fake_train")
def test_ctrl_c_reaches_every_run_and_starts_no_more(clpet, words: Path, tmp_path: Path) -> None:
    def press() -> None:
        while len(list(tmp_path.glob("waiting-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    result = clpet(*sweep(words, "seed=3", "train.lr=1e-3,2e-3,3e-3"))
    assert (result.code, result.err.splitlines()) == (
        EXIT_TEMPFAIL, ["clpet: stopped by SIGINT; progress is saved, re-run the same command to resume"]
    )  # fmt: skip
    lines = result.out.splitlines()
    assert len([line for line in lines if line.endswith(": saved")]) == 2
    assert not any("train.lr=0.003" in line for line in lines)


def test_every_run_has_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # a value set by the user is kept
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6f")
    cfg = OmegaConf.create({"hardware": {"device": "auto", "threads": None}})
    result = parallel_runs.environments(cfg, 3)
    assert result == [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "GPU-6f", "4")]
    cfg.hardware.device = "cpu"
    assert parallel_runs.environments(cfg, 3) == [{}, {}, {}]


@pytest.mark.usefixtures("fake_train")
def test_options_that_forbid_parallel_runs_are_named(clpet, words: Path, tmp_path: Path) -> None:
    for more, expected in (
        ("hardware.parallel_runs=0", "hardware.parallel_runs must be at least 1, not 0"),
        ("hardware.ranks=2", "hardware.parallel_runs needs hardware.ranks=1, not 2"),
    ):
        result = clpet(*sweep(words, "seed=0", more))
        assert (result.code, expected in result.err) == (2, True), result.err
    assert not list(tmp_path.glob("noted-*"))


@pytest.mark.slow
def test_a_parallel_sweep_gives_the_scores_of_a_serial_one(clpet, words: Path, tmp_path: Path) -> None:
    """On one thread each; both runs share a cold cache."""
    args = ["train", "-m", *tiny_args(words), "method=dynamic_conpet,replay"]
    assert clpet(*args, "output_dir=serial").code == 0
    result = clpet(*args, "output_dir=parallel", "hardware.parallel_runs=2")
    assert result.code == 0, result.err
    scores = {
        root: {
            path.parts[-3]: json.loads(path.read_text())["scores"]
            for path in tmp_path.glob(f"{root}/*/*/*/results.json")
        }
        for root in ("serial", "parallel")
    }
    assert scores["parallel"] == scores["serial"]
    assert scores["serial"].keys() == {"dynamic_conpet", "replay"}
    assert len([line for line in result.out.splitlines() if line.startswith("run ")]) == 2
