"""Two processes on this machine's CPU (gloo) compute the same run as one process."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from clpet.cli.launch import RankError, start_ranks
from clpet.evaluation.evaluator import Evaluator
from clpet.runtime.distributed import init_distributed, to_cpu
from clpet.runtime.signals import EXIT_TEMPFAIL
from clpet.training.progress import NoProgress
from tests.conftest import domain_args, methods_of, run_cli, set_up, tiny_args, words_of

pytestmark = pytest.mark.usefixtures("forked_ranks")  # tests of the Python API and of launchers spawn theirs
CASES: dict[str, list[str]] = {
    **{name: words_of(name) for name in methods_of("classification")},
    "sequential": ["method=sequential", "train.global_batch_size=23"],  # 24 examples: the last batch has one
    "replay": ["method=replay", "replay=fixed", "train.select=best"],
    "muon": ["method=sequential", "train.optimizer=muon"],
    "sgd": ["method=sequential", "train.optimizer=sgd", "train.momentum=0.9", "train.lr=0.1"],
    "lwf": ["method=lwf", "train.eps=1e-3"],  # a full step of AdamW on a gradient of rounding alone would differ
    "aim_merging": ["method=aim_merging", "replay=all", "method.interval=2", "method.longest=2", "method.alarm=0.01"],
    "dynamic_conpet_k2": ["method=dynamic_conpet", "method.top_k=2", "hardware.micro_batch_size=2"],
    "kif": ["method=kif", "train.select=best", "train.clip=1"],
    "text_to_text": ["method=kif", "model=tiny_llama", "objective=text_to_text", "benchmark.max_target=8"],
    "sdft": [
        "method=sdft",
        "model=tiny_llama",
        "objective=text_to_text",
        "benchmark.max_target=8",
        "replay=share",
        "hardware.micro_batch_size=2",
        "train.eps=1e-3",
    ],
    "lamol": ["method=lamol", "model=tiny_llama", "objective=text_to_text", "benchmark.max_target=8"],
    "preference": [
        "method=kif",
        "model=tiny_llama",
        "objective=preference",
        "objective.rejected=task",
        "benchmark.max_target=8",
    ],
    "language_modeling": ["method=sequential"],
}
SHORT = [
    "cache_dir=null",
    "train.epochs=1",
    "train.global_batch_size=10",
    "evaluation.max_tokens=500",
    "benchmark.order=null",
]


def overrides_of(name: str, words: Path, prose: Path) -> list[str]:
    """Returns the overrides of a case."""
    args = domain_args(prose, "benchmark.max_train=20") if name == "language_modeling" else tiny_args(words)
    return [*args, *SHORT[: 4 if name == "language_modeling" else 3], *CASES[name]]


class Losses(NoProgress):
    """Records the running mean of the loss after every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, epoch: int, step: int, examples: int, loss: torch.Tensor) -> None:
        self.values.append(loss.item())


def traced(overrides: list[str]) -> dict[str, Any]:
    """A run over two tasks: its losses, state, costs, and the predictions after both."""
    run = set_up(overrides)
    run.trainer.progress = losses = Losses()
    costs = []
    for index, task in run.method.curriculum()[:2]:
        run.trainer.begin_task(index)
        run.method.learn(task, index, run.trainer)
        run.method.after_task(task, index)
        costs.append(run.method.objective.meter.take_learning())
    evaluation = Evaluator(run.benchmark, run.data)(run.method, index + 1, [0, 1])
    scores = [score.value for score in evaluation.seen.values()]
    return {
        "losses": losses.values,
        "state": to_cpu(run.method.state_dict()),
        "rows": {name: values.tolist() for name, values in evaluation.rows.items()},
        "scores": scores,
        "costs": costs,
    }


def trace(folder: str, cases: dict[str, list[str]]) -> None:
    """Runs the cases on one of two ranks and saves its results."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        results = {name: traced(overrides) for name, overrides in cases.items()}
        torch.save(results, Path(folder, f"{ranks.index}.pt"))


@pytest.fixture(scope="module")
def by_rank(
    forked_ranks: None, words: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The results of every case, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(2, trace, str(folder), {name: overrides_of(name, words, prose) for name in CASES})
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(2)]


def same(one: Any, two: Any, tolerance: float = 0.0) -> bool:
    """Whether two trees are equal, numbers up to a tolerance."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key], tolerance) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b, tolerance) for a, b in zip(one, two, strict=True))
    if isinstance(one, torch.Tensor | np.ndarray | float):
        one, two = torch.as_tensor(one), torch.as_tensor(two)
        return one.shape == two.shape and torch.allclose(
            one.double(), two.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return one == two


@pytest.mark.slow
@pytest.mark.xdist_group("two_ranks")  # one worker: the two ranks run all cases once
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_the_same_as_one_process(name: str, words: Path, prose: Path, by_rank: list) -> None:
    """Equal losses at every step and equal predictions; the state of the method is bit-identical on both ranks."""
    first, second = (results[name] for results in by_rank)
    assert same(first["state"], second["state"])
    assert same(first["losses"], second["losses"])
    assert same(first["rows"], second["rows"])
    single = traced(overrides_of(name, words, prose))
    assert len(single["losses"]) == len(first["losses"])
    assert np.abs(np.subtract(single["losses"], first["losses"])).max(initial=0) < 1e-5
    assert single["scores"] == pytest.approx(first["scores"], rel=1e-4)
    assert single["rows"].keys() == first["rows"].keys()
    for key, values in single["rows"].items():
        if isinstance(values[0], float):
            assert np.abs(np.subtract(values, first["rows"][key])).max() < 1e-3
        else:
            assert values == first["rows"][key]
    if name != "ewc":  # every rank computes all of the Fisher information
        counts = ("forward_examples", "backward_examples", "validated_examples")
        assert [[c[key] for key in counts] for c in single["costs"]] == [
            [c[key] for key in counts] for c in first["costs"]
        ]


def results(root: Path) -> dict:
    (path,) = root.glob("*/*/s*/results.json")
    return json.loads(path.read_text())


def predictions(root: Path) -> list:
    """Every prediction after every task."""
    files = sorted(root.glob("*/*/s*/predictions/*.parquet"))
    # Without the probabilities, which several ranks round differently.
    return [pyarrow.parquet.read_table(path).drop_columns("probability").to_pylist() for path in files]


TWO = ["hardware.ranks=2", "cache_dir=null", "train.epochs=1"]


@pytest.mark.slow
def test_a_sharded_run_saves_adapters_that_load_on_one_rank(words: Path, clpet, tmp_path: Path) -> None:
    """With a last batch of odd size in micro-batches of three: one rank has fewer micro-batches than the other."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaModel

    args = [
        "train",
        "method=sequential",
        *tiny_args(words),
        *TWO,
        "model=tiny_llama",
        "train.global_batch_size=23",
        "hardware.micro_batch_size=3",
    ]
    assert clpet(*args, "hardware.ranks=1", "output_dir=one").code == 0
    result = clpet(*args, "hardware.shard=true", "hardware.gradient_checkpointing=true", "output_dir=two")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("learning_accuracy") == 0  # the ranks write to the terminal itself
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["scores"] == two["scores"]
    assert predictions(tmp_path / "one") == predictions(tmp_path / "two")
    assert (two["batch"]["devices"], two["parameters"]) == (2, one["parameters"])
    folders = [next((tmp_path / name).glob("*/*/s*/adapters/default")) for name in ("one", "two")]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert same(*tensors, tolerance=1e-5)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=266, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = PeftModel.from_pretrained(LlamaModel(config), folders[1])
    assert torch.isfinite(model(torch.tensor([[5, 6]])).last_hidden_state).all()


@pytest.mark.slow
def test_a_dry_run_of_two_ranks_needs_no_weights(clpet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = clpet("train", "model=llama_7b", "peft.r=4", "dry_run=true", "hardware=cpu", *TWO)
    assert (result.code, result.err) == (0, "")


@pytest.mark.slow
def test_an_error_on_a_rank_ends_the_run_with_one_line(words: Path, clpet, tmp_path: Path) -> None:
    result = clpet("train", "method=sequential", *tiny_args(words), *TWO, "train.lr=1e30")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("clpet: the loss of task 1")
    assert list(tmp_path.glob("outputs/*/*/s*/results.json")) == []


def killed() -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        if ranks.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_one() -> None:
    with pytest.raises(RankError, match=r"rank \d (was killed \(SIGKILL\)|or another rank ended without a message)"):
        start_ranks(2, killed)


@pytest.mark.slow
def test_tasks_of_a_slurm_step_are_ranks(words: Path, clpet, tmp_path: Path) -> None:
    """Two processes with the environment variables that srun would set."""
    args = ["train", "method=sequential", *tiny_args(words), "cache_dir=null", "train.epochs=1"]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    printed = [tmp_path / "0.txt", tmp_path / "1.txt"]

    def task(rank: int) -> None:
        os.environ.update(step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        with printed[rank].open("w") as sys.stdout:
            sys.stderr = sys.stdout
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            code = run_cli(*args, "hardware.ranks=auto", "output_dir=two")
        os._exit(code)

    tasks = [multiprocessing.get_context("fork").Process(target=task, args=[rank]) for rank in (0, 1)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(timeout=300)
    assert [process.exitcode for process in tasks] == [0, 0], printed[0].read_text()
    assert "learning_accuracy" in printed[0].read_text()
    assert printed[1].read_text() == ""
    assert clpet(*args, "output_dir=one").code == 0
    assert results(tmp_path / "one")["scores"] == results(tmp_path / "two")["scores"]


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_on_one(words: Path, clpet, tmp_path: Path) -> None:
    """After a signal to the launcher both ranks stop at the same step; a single process then finishes the run."""
    args = ["train", "method=kif", *tiny_args(words), "train.epochs=10", "cache_dir=null", "train.save_minutes=0.002"]
    assert clpet(*args, "output_dir=whole").code == 0
    with stopped_at(tmp_path / "cut", SIGNAL := signal.SIGUSR2):
        cut = clpet(*args, "hardware.ranks=2", "output_dir=cut")
    assert cut.code == EXIT_TEMPFAIL
    assert f"stopped by {SIGNAL.name}" in cut.err
    resumed = clpet(*args, "output_dir=cut")
    assert resumed.code == 0
    assert "resuming after" in resumed.out
    one, two = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert same(one["scores"], two["scores"], tolerance=1e-4)
    assert [cost["backward_examples"] for cost in one["cost"]] == [cost["backward_examples"] for cost in two["cost"]]


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_on_two_bit_for_bit(words: Path, clpet, tmp_path: Path) -> None:
    """Every rank resumes the random state of its own dropout."""
    args = [
        "train",
        "method=sequential",
        *tiny_args(words),
        *TWO,
        "train.epochs=10",
        "peft.dropout=0.3",
        "model.dropout=0.2",
        "train.save_minutes=0.002",
    ]
    assert clpet(*args, "output_dir=whole").code == 0
    with stopped_at(tmp_path / "cut", signal.SIGTERM):
        assert clpet(*args, "output_dir=cut").code == EXIT_TEMPFAIL
    assert clpet(*args, "output_dir=cut").code == 0
    files = [
        next((tmp_path / name).glob("*/*/s*/adapters/default")) / "adapter_model.safetensors"
        for name in ("whole", "cut")
    ]
    assert same(*map(load_file, files))


@contextlib.contextmanager
def stopped_at(root: Path, signum: int):
    """Signals this process as soon as a run in the folder has written a checkpoint inside a task."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            if any("-" in path.name for path in root.glob("*/*/s*/state/0*")):
                os.kill(os.getpid(), signum)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
