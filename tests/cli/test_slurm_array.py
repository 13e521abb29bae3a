"""The plan of a sweep that scripts/slurm_array.sh submits."""

import shlex
from pathlib import Path

import pytest

from tests.conftest import tiny_args


def on_slurm(words: Path) -> list[str]:
    """Overrides of a tiny run on SLURM."""
    return [*(word for word in tiny_args(words) if word != "hardware=cpu"), "hardware=slurm_cpu"]


def test_one_line_per_run_and_the_flags_of_its_hardware(clpet, words: Path, tmp_path: Path) -> None:
    more = ["hydra.launcher.partition=long", "hydra.launcher.mem_gb=2", "hydra.launcher.array_parallelism=3",
            "+hydra.launcher.additional_parameters.mail_type=END"]  # fmt: skip
    result = clpet("sweep", "-m", "seed=0,1", *on_slurm(words), "method=sequential,replay", *more)
    file, *flags = result.out.split()
    assert set(flags) == {"--array=0-3%3", "--partition=long", "--mem=2G", "--time=240", "--cpus-per-task=4", "--nodes=1",
                          "--ntasks-per-node=1", "--job-name=clpet", "--signal=B:USR2@120", "--requeue", "--mail-type=END"}  # fmt: skip
    runs = [shlex.split(line) for line in Path(file).read_text().splitlines()]
    assert [[word for word in run if word.startswith(("seed=", "method="))] for run in runs] == [
        ["seed=0", "method=sequential"],
        ["seed=0", "method=replay"],
        ["seed=1", "method=sequential"],
        ["seed=1", "method=replay"],
    ]
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {".slurm", "multirun.yaml"}


def test_finished_runs_are_skipped(clpet, words: Path, tmp_path: Path) -> None:
    sweep = ["seed=0,1", *on_slurm(words), "method=sequential"]
    assert clpet("train", *tiny_args(words), "method=sequential", "seed=1").code == 0
    file, *flags = clpet("sweep", *sweep).out.split()
    assert "--array=0-0%256" in flags
    (line,) = Path(file).read_text().splitlines()
    assert "seed=0" in shlex.split(line)
    (one,) = tmp_path.glob("outputs/files/sequential/s1-*")
    (one.parent / one.name.replace("s1-", "s0-")).mkdir()
    (one.parent / one.name.replace("s1-", "s0-") / "results.json").write_text("{}")
    assert clpet("sweep", *sweep).out.strip() == ""
    assert "--array=0-1%256" in clpet("sweep", *sweep, "fresh=true").out


def test_a_line_of_the_plan_gives_the_same_run(clpet, words: Path) -> None:
    """Spaces, quotes, commas and lists pass through the shell and Hydra a second time and give the same run."""
    typed = [
        "benchmark.text='it\\'s {text}, \"so\"'",
        "benchmark.tasks=[fruit,river]",
        "seed=0,1",
        "train.lr=[1e-3,2e-3]",
    ]
    lines = Path(clpet("sweep", *tiny_args(words), *typed).out.split()[0]).read_text().splitlines()
    again = [Path(clpet("sweep", *shlex.split(line)).out.split()[0]).read_text() for line in lines]
    assert again == [f"{line}\n" for line in lines]


def test_repeated_settings_are_one_run_and_mistakes_one_line(clpet, words: Path) -> None:
    file, *flags = clpet("sweep", *tiny_args(words), "seed=0,0", "tracking.mode=off,off").out.split()
    assert flags == ["--array=0-0"]
    assert len(Path(file).read_text().splitlines()) == 1
    wrong = clpet("sweep", "method=sequental,replay")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean sequential" in wrong.err


def test_without_slurm_there_is_one_line(clpet, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = clpet("train", *on_slurm(words))
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("clpet: SLURM is not installed on this machine")
