"""Runs on a real SLURM of one node: arrays, missing runs, requeues and time limits, with both ways of submission.

The test's own method sleeps in every step of the first task that a process learns, and notes each step. So runs last
long enough to be interrupted, and the notes show which steps were repeated.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.test_slurm_array import on_slurm
from tests.conftest import tiny_args

ROOT = Path(__file__).resolve().parents[2]
LOCAL, ARRAY = (str(ROOT / "scripts" / name) for name in ("local_slurm.sh", "slurm_array.sh"))
STARTED: list[subprocess.Popen] = []
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
SMALL = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
NAPPING = """
import os, time
from dataclasses import dataclass
from clpet.methods.sequential import Sequential

@dataclass
class Napping(Sequential):
    def learn(self, task, index, trainer):
        self.first, self.index = getattr(self, "first", index), index
        super().learn(task, index, trainer)

    def loss(self, context):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{os.getpid()} {self.index}\\n")
        time.sleep(float(os.environ["NAP"]) if self.first == 0 else 0)
        return super().loss(context)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables for a SLURM with eight CPUs."""
    ready = subprocess.run([LOCAL, "install"], capture_output=True, text=True, check=False)
    if ready.returncode:
        pytest.skip(ready.stderr.strip().splitlines()[-1])
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run([LOCAL, "start", state], env={**os.environ, "CPUS": "8"}, check=True)
    yield {**os.environ, "SLURM_CONF": f"{state}/slurm.conf", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    for process in STARTED:  # a launcher waits forever for a job that never ends
        process.kill()
    subprocess.run([LOCAL, "stop", state], check=True)


class Submission:
    """One way of submission (hydra.launcher or slurm_array.sh, by name) and the jobs that it has submitted."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder, self.environment = name, folder, environment
        self.out = folder / name

    def submit(self, words: list[str], flags: tuple[str, ...] = ()) -> subprocess.Popen:
        """Starts the command that submits."""
        words = [*words, f"output_dir={self.name}", f"hydra.launcher.name={self.name}"]
        launcher = [sys.executable, "-m", "clpet", "train", "-m", *words]
        command = launcher if self.name.startswith("launcher") else [ARRAY, *flags, "--", *words]
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        STARTED.append(process)
        return process

    def wait(self, process: subprocess.Popen) -> str:
        """Waits until the command and its jobs have ended; returns the output of the command, which must succeed."""
        output = "".join(process.communicate(timeout=300))
        assert process.returncode == 0, output
        until(lambda: not self.jobs(), 300)
        return output

    def jobs(self) -> list[str]:
        """Ids of queued and running jobs, one per task of an array."""
        listed = ["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%i"]
        return subprocess.run(listed, env=self.environment, capture_output=True, text=True, check=True).stdout.split()

    def states(self) -> list[str]:
        """Final states of its jobs, sorted."""
        shown = subprocess.run(["scontrol", "show", "job", "--oneliner"], env=self.environment, capture_output=True,
                               text=True, check=True)  # fmt: skip
        mine = [line for line in shown.stdout.splitlines() if f"JobName={self.name} " in line]
        return sorted(line.split("JobState=")[1].split()[0] for line in mine)

    def results(self) -> dict[str, dict]:
        """{run directory relative to the output folder: results} of the finished runs."""
        results = self.out.glob("*/*/s*/results.json")
        return {str(path.parent.relative_to(self.out)): json.loads(path.read_text()) for path in results}


def until(condition: Callable[[], object], seconds: float) -> None:
    """Waits for a condition; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is not met after {seconds} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def napping(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of the sleeping method on twelve tasks of two labels, four steps each."""
    folder = tmp_path_factory.mktemp("napping")
    (folder / "method").mkdir()
    (folder / "napping.py").write_text(NAPPING)
    (folder / "method" / "napping.yaml").write_text("_target_: napping.Napping\nname: napping\n")
    rows = [{"text": f"word{label} n{copy}", "label": f"label{label}", "task": f"task{label // 2:02d}"}
            for label in range(24) for copy in range(4)]  # fmt: skip
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--config-dir={folder}", *on_slurm(folder), *SMALL, "method=napping", "train.global_batch_size=4"]


@pytest.fixture(scope="module")
def uninterrupted(napping: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of the same run without sleep and without SLURM."""
    folder = tmp_path_factory.mktemp("whole")
    environment = {**os.environ, "NAP": "0", "NOTES": str(folder / "notes")}
    command = [sys.executable, "-m", "clpet", "train", *napping, "hydra.mode=RUN"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (path,) = folder.glob("outputs/*/*/s*/results.json")
    return {str(path.parent.relative_to(folder / "outputs")): json.loads(path.read_text())}


def legs(notes: Path) -> list[list[int]]:
    """The steps of each process of a run, as the number of the task that was learned."""
    steps: dict[str, list[int]] = {}
    for line in notes.read_text().splitlines() if notes.exists() else ():
        process, task = line.split()
        steps.setdefault(process, []).append(int(task))
    return list(steps.values())


def check_resumed(submission: Submission, uninterrupted: dict) -> None:
    """Checks for the scores of an uninterrupted run, and that every process resumed at most one step back."""
    results = submission.results()
    assert {name: run["scores"] for name, run in results.items()} == {
        name: run["scores"] for name, run in uninterrupted.items()
    }
    legs_of_run = legs(Path(submission.environment["NOTES"]))
    assert len(legs_of_run) > 1
    assert legs_of_run[-1][0] > 0
    assert all(after[0] >= before[-1] for before, after in pairwise(legs_of_run))
    assert sum(len(leg) for leg in legs_of_run) <= 12 * 4 + len(legs_of_run) - 1


@pytest.fixture(scope="module")
def timed_out(napping: list[str], slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Runs of more than a minute with a time limit of one, submitted in both ways; they run during the other tests."""
    folder, started = tmp_path_factory.mktemp("timed"), []
    for name in ("launcher-timed", "array-timed"):
        submission = Submission(name, folder, {**slurm, "NAP": "1.5", "NOTES": str(folder / f"{name}.notes")})
        limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1"]
        started.append((submission, submission.submit([*napping, *limits])))
    return started


@pytest.mark.usefixtures("timed_out")
def test_both_ways_of_submission_give_the_run_directories_of_a_single_process(
    words: Path, slurm: dict[str, str], clpet, tmp_path: Path
) -> None:
    """Four runs as one array each; after one result is deleted, the script submits only that run again."""
    sweep = [*on_slurm(words), *SMALL, "method=sequential,replay", "seed=0,1"]
    launcher, array = (Submission(name, tmp_path, slurm) for name in ("launcher", "array"))
    processes = [submission.submit(sweep) for submission in (launcher, array)]
    assert "Submitted batch job" in array.wait(processes[1])
    output = launcher.wait(processes[0])
    assert output.count("sacct") == 1, "this SLURM has no accounting"
    assert "sweep of 4 runs as SLURM jobs; output in launcher/.slurm" in output
    assert "clpet runs launcher --compare method" in output
    assert clpet("train", *tiny_args(words), "method=replay", "seed=1").code == 0
    ((run, single),) = Submission("outputs", tmp_path, slurm).results().items()
    results, same = launcher.results(), array.results()
    assert len(results) == 4
    assert results.keys() == same.keys()
    assert all(results[run]["scores"] == same[run]["scores"] for run in results)
    assert results[run]["scores"] == single["scores"]
    (log,) = {path.name.split("_")[0] for path in array.out.glob(".slurm/*.log")}
    assert len(list(array.out.glob(".slurm/*.log"))) == 4
    assert len(list(launcher.out.glob(".slurm/*/*_0_log.out"))) == 4

    (array.out / run / "results.json").unlink()
    times = {path: path.stat().st_mtime for path in array.out.glob("*/*/s*/results.json")}
    array.wait(array.submit(sweep))
    assert array.results().keys() == results.keys()
    assert all(path.stat().st_mtime == before for path, before in times.items())
    assert len([path for path in array.out.glob(".slurm/*.log") if not path.name.startswith(f"{log}_")]) == 1
    assert "every run of this sweep is finished" in array.wait(array.submit(sweep))


@pytest.mark.usefixtures("timed_out")
def test_the_tasks_of_a_job_are_ranks(words: Path, slurm: dict[str, str], clpet, tmp_path: Path) -> None:
    """Two processes of one run, started by srun, give the scores of one process."""
    submission = Submission("launcher-ranks", tmp_path, slurm)
    run = [*on_slurm(words), *SMALL, "method=sequential", "cache_dir=null"]
    submission.wait(submission.submit([*run, "hydra.launcher.tasks_per_node=2", "hardware.ranks=auto"]))
    assert clpet("train", *tiny_args(words), "method=sequential", "cache_dir=null").code == 0
    ((_, results),), ((_, single),) = (
        submission.results().items(),
        Submission("outputs", tmp_path, slurm).results().items(),
    )
    assert results["scores"] == single["scores"]
    assert len(list(submission.out.glob(".slurm/*/*_log.out"))) == 2


@pytest.mark.usefixtures("timed_out")
def test_a_run_that_fails_fails_for_slurm_too(words: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """The waiting command prints one line and fails; the other run of the sweep finishes."""
    sweep = [*on_slurm(words), *SMALL, "method=sequential", "train.lr=1e30,1e-3"]
    submissions = [Submission(name, tmp_path, slurm) for name in ("launcher-failing", "array-failing")]
    processes = [submission.submit(sweep) for submission in submissions]
    output = processes[0].communicate(timeout=300)[1]
    assert processes[0].returncode == 1
    assert "clpet: the loss of task 1 in epoch 1, step 2 is nan" in output.splitlines()[-1]
    submissions[1].wait(processes[1])
    for submission in submissions:
        until(lambda submission=submission: not submission.jobs(), 60)
        assert len(submission.results()) == 1
        assert submission.states() == ["COMPLETED", "FAILED"]


def test_a_rejected_submission_reports_the_message_of_sbatch(
    words: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    for name in ("launcher-refused", "array-refused"):
        process = Submission(name, tmp_path, slurm).submit(
            [*on_slurm(words), *SMALL, "hydra.launcher.partition=nowhere"]
        )
        output = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "Invalid partition name specified" in output.splitlines()[-1]


@pytest.mark.usefixtures("timed_out")
def test_a_requeued_run_resumes(napping: list[str], uninterrupted: dict, slurm: dict[str, str], tmp_path: Path) -> None:
    """scontrol requeue in the third task or later: the same scores, and the first tasks are not learned again."""
    submissions = [Submission(name, tmp_path, {**slurm, "NAP": "0.3", "NOTES": str(tmp_path / f"{name}.notes")})
             for name in ("launcher-requeued", "array-requeued")]  # fmt: skip
    processes = [submission.submit(napping) for submission in submissions]
    for submission in submissions:
        until(
            lambda submission=submission: any(
                task >= 2 for leg in legs(Path(submission.environment["NOTES"])) for task in leg
            ),
            120,
        )
        (job,) = submission.jobs()
        subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    for submission, process in zip(submissions, processes, strict=True):
        submission.wait(process)
        check_resumed(submission, uninterrupted)


def test_a_run_that_is_out_of_time_resumes(timed_out: list[tuple], uninterrupted: dict) -> None:
    for submission, process in timed_out:
        submission.wait(process)
        check_resumed(submission, uninterrupted)
