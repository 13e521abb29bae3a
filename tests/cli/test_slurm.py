"""Runs on a real SLURM of one node: arrays, gaps, requeues and time-outs, by hydra.launcher and by slurm_array.sh.

A method of the test's own naps in every step, until it goes on after its first task, and notes which task it is
learning: so runs last as long as a time limit needs them to, and what was repeated can be seen.
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

    def loss(self, batch):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{os.getpid()} {self.index}\\n")
        time.sleep(float(os.environ["NAP"]) if self.first == 0 else 0)
        return super().loss(batch)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a SLURM answers that says it has eight CPUs."""
    ready = subprocess.run([LOCAL, "install"], capture_output=True, text=True, check=False)
    if ready.returncode:
        pytest.skip(ready.stderr.strip().splitlines()[-1])
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run([LOCAL, "start", state], env={**os.environ, "CPUS": "8"}, check=True)
    yield {**os.environ, "SLURM_CONF": f"{state}/slurm.conf", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    for process in STARTED:  # a launcher whose job never ends waits for ever
        process.kill()
    subprocess.run([LOCAL, "stop", state], check=True)


class Road:
    """A way to SLURM: `submit` starts it, `wait` waits until nothing of it is queued or runs."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder, self.environment = name, folder, environment
        self.out = folder / name

    def submit(self, words: list[str], flags: tuple[str, ...] = ()) -> subprocess.Popen:
        words = [*words, f"output_dir={self.name}", f"hydra.launcher.name={self.name}"]
        launcher = [sys.executable, "-m", "clpet", "train", "-m", *words]
        command = launcher if self.name.startswith("launcher") else [ARRAY, *flags, "--", *words]
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        STARTED.append(process)
        return process

    def wait(self, process: subprocess.Popen) -> str:
        """What the command said; fails the test when the command did, or when jobs do not end."""
        said = "".join(process.communicate(timeout=300))
        assert process.returncode == 0, said
        until(lambda: not self.jobs(), 300)
        return said

    def jobs(self) -> list[str]:
        """Ids of the jobs that are queued or run, one per task of an array."""
        listed = ["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%i"]
        return subprocess.run(listed, env=self.environment, capture_output=True, text=True, check=True).stdout.split()

    def states(self) -> list[str]:
        """How its jobs ended."""
        shown = subprocess.run(["scontrol", "show", "job", "--oneliner"], env=self.environment, capture_output=True,
                               text=True, check=True)  # fmt: skip
        mine = [line for line in shown.stdout.splitlines() if f"JobName={self.name} " in line]
        return sorted(line.split("JobState=")[1].split()[0] for line in mine)

    def results(self) -> dict[str, dict]:
        """{run directory inside the output folder: results} of the finished runs."""
        found = self.out.glob("*/*/s*/results.json")
        return {str(path.parent.relative_to(self.out)): json.loads(path.read_text()) for path in found}


def until(condition: Callable[[], object], seconds: float) -> None:
    """Waits for a condition; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def napping(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for a run of twelve tasks of two labels, four steps each, by a method that naps."""
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
def whole(napping: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of the run without naps and without SLURM."""
    folder = tmp_path_factory.mktemp("whole")
    environment = {**os.environ, "NAP": "0", "NOTES": str(folder / "notes")}
    command = [sys.executable, "-m", "clpet", "train", *napping, "hydra.mode=RUN"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (path,) = folder.glob("outputs/*/*/s*/results.json")
    return {str(path.parent.relative_to(folder / "outputs")): json.loads(path.read_text())}


def legs(notes: Path) -> list[list[int]]:
    """The tasks that each process of a run learned, a number per step."""
    found: dict[str, list[int]] = {}
    for line in notes.read_text().splitlines() if notes.exists() else ():
        process, task = line.split()
        found.setdefault(process, []).append(int(task))
    return list(found.values())


def check_continued(road: Road, whole: dict) -> None:
    """The matrix of an uninterrupted run, in several legs that go on where the one before was, at most a step back."""
    found = road.results()
    assert {place: run["scores"] for place, run in found.items()} == {
        place: run["scores"] for place, run in whole.items()
    }
    parts = legs(Path(road.environment["NOTES"]))
    assert len(parts) > 1
    assert parts[-1][0] > 0
    assert all(after[0] >= before[-1] for before, after in pairwise(parts))
    assert sum(len(part) for part in parts) <= 12 * 4 + len(parts) - 1


@pytest.fixture(scope="module")
def timed_out(napping: list[str], slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Runs of over a minute with a time limit of one, on their way by both roads while the other tests go on."""
    folder, started = tmp_path_factory.mktemp("timed"), []
    for name in ("launcher-timed", "array-timed"):
        road = Road(name, folder, {**slurm, "NAP": "1.5", "NOTES": str(folder / f"{name}.notes")})
        limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1"]
        started.append((road, road.submit([*napping, *limits])))
    return started


@pytest.mark.usefixtures("timed_out")
def test_both_roads_give_the_run_directories_of_a_single_process(
    words: Path, slurm: dict[str, str], clpet, tmp_path: Path
) -> None:
    """Four runs as one array each; of the script's, a run that is missing is the only one submitted again."""
    sweep = [*on_slurm(words), *SMALL, "method=sequential,replay", "seed=0,1"]
    launcher, array = (Road(name, tmp_path, slurm) for name in ("launcher", "array"))
    processes = [road.submit(sweep) for road in (launcher, array)]
    assert "Submitted batch job" in array.wait(processes[1])
    launcher.wait(processes[0])
    assert clpet("train", *tiny_args(words), "method=replay", "seed=1").code == 0
    ((place, single),) = Road("outputs", tmp_path, slurm).results().items()
    found, same = launcher.results(), array.results()
    assert len(found) == 4
    assert found.keys() == same.keys()
    assert all(found[run]["scores"] == same[run]["scores"] for run in found)
    assert found[place]["scores"] == single["scores"]
    (log,) = {path.name.split("_")[0] for path in array.out.glob(".slurm/*.log")}
    assert len(list(array.out.glob(".slurm/*.log"))) == 4
    assert len(list(launcher.out.glob(".slurm/*/*_0_log.out"))) == 4

    (array.out / place / "results.json").unlink()
    times = {path: path.stat().st_mtime for path in array.out.glob("*/*/s*/results.json")}
    array.wait(array.submit(sweep))
    assert array.results().keys() == found.keys()
    assert all(path.stat().st_mtime == before for path, before in times.items())
    assert len([path for path in array.out.glob(".slurm/*.log") if not path.name.startswith(f"{log}_")]) == 1
    assert "every run of this sweep is finished" in array.wait(array.submit(sweep))


@pytest.mark.usefixtures("timed_out")
def test_the_tasks_of_a_job_are_ranks(words: Path, slurm: dict[str, str], clpet, tmp_path: Path) -> None:
    """Two processes of one run, started by srun: the figures of one process."""
    road = Road("launcher-ranks", tmp_path, slurm)
    run = [*on_slurm(words), *SMALL, "method=sequential", "cache_dir=null"]
    road.wait(road.submit([*run, "hydra.launcher.tasks_per_node=2", "hardware.ranks=auto"]))
    assert clpet("train", *tiny_args(words), "method=sequential", "cache_dir=null").code == 0
    ((_, found),), ((_, single),) = road.results().items(), Road("outputs", tmp_path, slurm).results().items()
    assert found["scores"] == single["scores"]
    assert len(list(road.out.glob(".slurm/*/*_log.out"))) == 2


@pytest.mark.usefixtures("timed_out")
def test_a_run_that_fails_fails_for_slurm_too(words: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """One line for the person who waits, and its exit code; the other run of the sweep is finished."""
    sweep = [*on_slurm(words), *SMALL, "method=sequential", "train.lr=1e30,1e-3"]
    roads = [Road(name, tmp_path, slurm) for name in ("launcher-failing", "array-failing")]
    processes = [road.submit(sweep) for road in roads]
    said = processes[0].communicate(timeout=300)[1]
    assert processes[0].returncode == 1
    assert "clpet: the loss of task 1 in epoch 1, step 2 is nan" in said.splitlines()[-1]
    roads[1].wait(processes[1])
    for road in roads:
        until(lambda road=road: not road.jobs(), 60)
        assert len(road.results()) == 1
        assert road.states() == ["COMPLETED", "FAILED"]


def test_a_refused_submission_ends_in_what_sbatch_says(words: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    for name in ("launcher-refused", "array-refused"):
        process = Road(name, tmp_path, slurm).submit([*on_slurm(words), *SMALL, "hydra.launcher.partition=nowhere"])
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "Invalid partition name specified" in said.splitlines()[-1]


@pytest.mark.usefixtures("timed_out")
def test_a_requeued_run_goes_on(napping: list[str], whole: dict, slurm: dict[str, str], tmp_path: Path) -> None:
    """scontrol requeue in the third task or later: the same matrix, and the first tasks are not learned again."""
    roads = [Road(name, tmp_path, {**slurm, "NAP": "0.3", "NOTES": str(tmp_path / f"{name}.notes")})
             for name in ("launcher-requeued", "array-requeued")]  # fmt: skip
    processes = [road.submit(napping) for road in roads]
    for road in roads:
        until(lambda road=road: any(task >= 2 for leg in legs(Path(road.environment["NOTES"])) for task in leg), 120)
        (job,) = road.jobs()
        subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    for road, process in zip(roads, processes, strict=True):
        road.wait(process)
        check_continued(road, whole)


def test_a_run_that_is_out_of_time_goes_on(timed_out: list[tuple], whole: dict) -> None:
    for road, process in timed_out:
        road.wait(process)
        check_continued(road, whole)
