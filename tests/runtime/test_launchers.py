"""Processes that another program has started: which variables name them, and who of them prints."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clpet.errors import ConfigError
from clpet.runtime.launchers import StartedRanks, rank_variables, slurm_variables, started_ranks
from tests.conftest import tiny_args

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
}


def without(names: str, variables: dict[str, str] = TORCHRUN) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names.split()}


def test_ranks_are_those_of_torchrun_or_of_a_slurm_step() -> None:
    """torchrun inside a SLURM step counts, not the step, whose tasks are the torchruns of the nodes."""
    assert started_ranks({}) is None
    assert started_ranks(TORCHRUN) == StartedRanks("torchrun", 3, 4, 1)
    assert started_ranks(SLURM) == StartedRanks("srun", 3, 8, 3)
    assert started_ranks({**SLURM, **TORCHRUN}) == StartedRanks("torchrun", 3, 4, 1)
    assert rank_variables({**SLURM, **TORCHRUN}) == without("TORCHELASTIC_RUN_ID")
    assert started_ranks(without("TORCHELASTIC_RUN_ID")) == StartedRanks("the launcher (WORLD_SIZE)", 3, 4, 1)


def test_one_process_of_a_launcher_is_a_run_by_itself() -> None:
    assert started_ranks({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert started_ranks({"RANK": "0"}) is None  # left over in a shell
    assert started_ranks({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_variables_of_a_slurm_step_become_those_of_torch() -> None:
    assert rank_variables(SLURM) == slurm_variables(SLURM) == {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "20410",
    }  # fmt: skip
    assert rank_variables({**SLURM, "WORLD_SIZE": "8"}) == slurm_variables(SLURM)  # exported by a script


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (without("MASTER_PORT LOCAL_RANK"), "has WORLD_SIZE=4, but not LOCAL_RANK, MASTER_PORT: start the processes"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but not RANK, LOCAL_RANK"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4: ranks are counted from 0"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is not a number"),
    ],
)
def test_half_a_set_of_variables_is_refused(variables: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        started_ranks(variables)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process as rank 0 of two that torchrun has started; the file that torchrun reads errors from."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hardware.ranks=4"], "hardware.ranks=4, but torchrun has started 2 processes: leave it out"),
        (["hardware.ranks=1"], "hardware.ranks=1, but torchrun has started 2 processes"),
        (["-m", "seed=0,1"], "torchrun has started 2 processes of one run, not of a sweep"),
        (["-m", "seed=0,1", "hardware.parallel_runs=2"], "torchrun has started 2 processes of one run, not of a sweep"),
        (["hardware=slurm_gpu"], "torchrun has started 2 processes of one run, not of a sweep"),
    ],
)
def test_options_that_contradict_the_launcher_are_refused(started: Path, words: list[str], line: str, clpet) -> None:
    result = clpet("train", "model=tiny", "tracking=off", *words)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert line in result.err
    message = json.loads(started.read_text())["message"]["message"]
    assert result.err == f"clpet: {message}\n"


def test_a_process_that_is_not_the_main_one_prints_nothing(started: Path, clpet, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert clpet("list", "hardware").out == ""
    for name in ("sys.stdout", "sys.stderr", "clpet.runtime.launchers._muted"):  # what `mute` sets, for after the test
        monkeypatch.setattr(name, None)
    result = clpet("train", "train.epochs=0")
    assert (result.code, result.out, result.err) == (2, "", "")
    assert "train.epochs must be at least 1" in started.read_text()


def contents(root: Path) -> dict[str, object]:
    """What a run has computed, by file relative to its output folder: scores, predictions and weights."""
    files: dict[str, object] = {}
    for path in root.glob("*/*/s*/**/*"):
        if path.suffix in (".parquet", ".safetensors"):
            files[str(path.relative_to(root))] = path.read_bytes()
    for path in root.glob("*/*/s*/results.json"):
        files[str(path.relative_to(root))] = json.loads(path.read_text())["scores"]
    return files


def torchrun(*flags: str, words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "clpet", "train", *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_torchrun_on_one_and_two_nodes_is_the_run_of_hardware_ranks(words: Path, clpet, tmp_path: Path) -> None:
    """The same folder, weights, predictions and scores bit for bit; two agents meet at a port of this machine."""
    args = ["method=sequential", *tiny_args(words), "cache_dir=null", "train.epochs=1"]
    assert clpet("train", *args, "hardware.ranks=2", "output_dir=ranks").code == 0
    expected = contents(tmp_path / "ranks")
    assert any(name.endswith("results.json") for name in expected)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agent = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
             "--rdzv-id=clpet", "--local-addr=127.0.0.1"]  # fmt: skip
    for name, starts in {"one": [["--standalone", "--nproc-per-node=2"]], "two": [agent, agent]}.items():
        processes = [torchrun(*flags, words=[*args, f"output_dir={name}"]) for flags in starts]
        printed = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(starts), printed
        assert sum(out.count("learning_accuracy") for out, _ in printed) == 1
        assert contents(tmp_path / name) == expected


@pytest.mark.slow
def test_an_error_under_torchrun_is_one_line(words: Path, clpet, tmp_path: Path) -> None:
    """It is the line of the rank that fails first; torchrun adds its own summary, with the same message in it."""
    args = ["method=sequential", *tiny_args(words), "cache_dir=null", "train.lr=1e30"]
    process = torchrun("--standalone", "--nproc-per-node=2", words=args)
    _, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line.startswith("clpet: ")]
    assert len(lines) == 1
    assert lines[0].startswith("clpet: the loss of task 1")
    assert lines[0].removeprefix("clpet: ") in errors.replace(lines[0], "")
