"""Several processes on one run give what one gives; the slow tests start two of them on this machine's CPU (gloo)."""

import contextlib
import json
import os
import signal
import subprocess
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

from clpet.cli.launch import RankError, slurm_environment, start
from clpet.evaluation.evaluator import Evaluator
from clpet.runtime.distributed import World, chunks, get_world, init_distributed, rows_of_rank, sum_flat, to_cpu
from clpet.runtime.signals import EXIT_TEMPFAIL
from tests.conftest import Silent, domain_args, methods_of, set_up, tiny_args

# Fast: what the ranks do with rows and buffers


def test_rows_are_split_evenly_and_none_is_lost() -> None:
    rows = np.arange(10, 21)
    parts = [rows_of_rank(rows, index, 4) for index in range(4)]
    assert [part.tolist() for part in parts] == [[10, 14, 18], [11, 15, 19], [12, 16, 20], [13, 17]]
    assert [len(rows_of_rank(rows[:2], index, 3)) for index in range(3)] == [1, 1, 0]
    assert rows_of_rank(rows, 0, 1) is rows


def test_micro_batches_hold_every_row_of_a_rank_once() -> None:
    assert [part.tolist() for part in chunks(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in chunks(np.arange(5), None)] == [[0, 1, 2, 3, 4]]
    assert chunks(np.arange(0), None) == chunks(np.arange(0), 2) == []


def test_ranks_of_a_sharded_backbone_pass_equally_often() -> None:
    """Five rows in micro-batches of two: the first rank has 3 rows and passes twice, the second has 2."""
    ranks = [World(), World()]
    for index, one in enumerate(ranks):
        one.size, one.index, one.sharded = 2, index, True
    found = [[(part.tolist(), counts) for part, counts in one.micro_batches(np.arange(5), 2)] for one in ranks]
    assert found == [[([0, 2], True), ([4], True)], [([1, 3], True), ([0], False)]]
    assert [[counts for _, counts in one.micro_batches(np.array([7]), None)] for one in ranks] == [[True], [False]]
    ranks[1].sharded = False
    assert ranks[1].micro_batches(np.array([7]), None) == []


def test_flat_buffers_sum_every_tensor_in_place() -> None:
    """As two ranks with equal gradients: all is doubled. A buffer has one dtype and at most `limit` scalars."""
    tensors = [torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.tensor(5.0), torch.ones(4)]
    sizes: list[tuple[torch.dtype, int]] = []

    def double(flat: torch.Tensor) -> None:
        sizes.append((flat.dtype, len(flat)))
        flat *= 2

    sum_flat(tensors, double, limit=8)
    assert [tensor.tolist() for tensor in tensors] == [[[0, 2, 4], [6, 8, 10]], [2, 2], 10, [2, 2, 2, 2]]
    assert sorted(sizes, key=str) == [(torch.bfloat16, 2), (torch.float32, 4), (torch.float32, 7)]


def test_one_process_is_a_world_of_its_own() -> None:
    one = get_world()
    assert (one.size, one.is_main, one.gather(3), one.all_reduce_max(2, 5)) == (1, True, [3], (2, 5))
    assert one.map(lambda part: part + 1, [1, 2]) == [2, 3]


def test_slurm_says_which_rank_a_process_is() -> None:
    found = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0",
    }
    assert slurm_environment(found) == {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20410"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method=sequential", "hardware.ranks=0"], "hardware.ranks must be auto, or a number of processes, not 0"),
        (["method=sequential", "hardware.shard=true", "peft=none"], "hardware.shard needs a frozen backbone"),
        (["method=sequential", "hardware.quantization=nf4"], "hardware.quantization=nf4 needs a CUDA device"),
        (["hardware.gradient_checkpointing=true", "method=o_lora"], "cannot be used with method=o_lora"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], line: str, clpet, tmp_path: Path) -> None:
    found = clpet("train", *tiny_args(tmp_path), *words)
    assert (found.code, found.err.count("\n")) == (1 if "nf4" in line else 2, 1)
    assert line in found.err


@pytest.mark.parametrize("model", [["model=tiny", "peft=lora"], ["model=tiny_llama"], ["model=tiny", "peft=none"]])
def test_recomputed_activations_change_rounding_only(model: list[str], make) -> None:
    """Kernels may add in another order; dropout of a frozen backbone would show, as would a cache written twice."""
    plain, again = (
        make("method=sequential", "train.epochs=1", *model, f"hardware.gradient_checkpointing={on}")
        for on in ("false", "true")
    )
    for run in (plain, again):
        run.learn(0)
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in (plain, again)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


# Slow: two processes


CASES: dict[str, list[str]] = {
    **{name: [f"method={name}"] for name in methods_of("classification")},
    "sequential": ["method=sequential", "train.global_batch_size=23"],  # 24 examples: the last batch has one
    "replay": ["method=replay", "replay=fixed", "train.select=best"],
    "lwf": ["method=lwf", "train.eps=1e-3"],  # a full step of AdamW on a gradient of rounding alone would differ
    "dynamic_conpet_k2": ["method=dynamic_conpet", "method.top_k=2", "hardware.micro_batch_size=2"],
    "kif": ["method=kif", "train.select=best", "train.clip=1"],
    "text_to_text": ["method=kif", "model=tiny_llama", "benchmark.objective=text_to_text", "benchmark.max_target=8"],
    "language_modeling": ["method=sequential"],
}
SHORT = [
    "cache_dir=null",
    "train.epochs=1",
    "train.global_batch_size=10",
    "evaluation.max_tokens=500",
    "benchmark.order=null",
]


def words_of(name: str, words: Path, prose: Path) -> list[str]:
    """The overrides of a case."""
    args = domain_args(prose, "benchmark.max_train=20") if name == "language_modeling" else tiny_args(words)
    return [*args, *SHORT[: 4 if name == "language_modeling" else 3], *CASES[name]]


class Losses(Silent):
    """Notes the running mean of the loss after every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, epoch: int, step: int, examples: int, loss: torch.Tensor) -> None:
        self.found.append(loss.item())


def traced(words: list[str]) -> dict[str, Any]:
    """A run over two tasks: its losses, its state, its counts and what it answers at the end."""
    run = set_up(words)
    run.trainer.progress = losses = Losses()
    costs = []
    for index, task in run.method.curriculum()[:2]:
        run.trainer.begin_task(index)
        run.method.learn(task, index, run.trainer)
        run.method.after_task(task, index)
        costs.append(run.method.objective.meter.take_learning())
    found = Evaluator(run.benchmark, run.data)(run.method, index + 1, [0, 1])
    scores = [score.value for score in found.seen.values()]
    return {
        "losses": losses.found,
        "state": to_cpu(run.method.state_dict()),
        "rows": {name: values.tolist() for name, values in found.rows.items()},
        "scores": scores,
        "costs": costs,
    }


def trace(folder: str, cases: dict[str, list[str]]) -> None:
    """The cases on one rank of two."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        found = {name: traced(words) for name, words in cases.items()}
        torch.save(found, Path(folder, f"{ranks.index}.pt"))


@pytest.fixture(scope="module")
def both(words: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks says of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    start(2, trace, str(folder), {name: words_of(name, words, prose) for name in CASES})
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(2)]


def same(one: Any, two: Any, tolerance: float = 0.0) -> bool:
    """Whether two trees hold the same, numbers up to a tolerance."""
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
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_learns(name: str, words: Path, prose: Path, both: list) -> None:
    """Equal losses step by step and the same answers; weights and the method's state are bit-identical on both ranks."""
    first, second = (found[name] for found in both)
    assert same(first["state"], second["state"])
    assert same(first["losses"], second["losses"])
    assert same(first["rows"], second["rows"])
    alone = traced(words_of(name, words, prose))
    assert len(alone["losses"]) == len(first["losses"])
    assert np.abs(np.subtract(alone["losses"], first["losses"])).max() < 1e-5
    assert alone["scores"] == pytest.approx(first["scores"], rel=1e-4)
    assert alone["rows"].keys() == first["rows"].keys()
    for key, values in alone["rows"].items():
        if isinstance(values[0], float):
            assert np.abs(np.subtract(values, first["rows"][key])).max() < 1e-3
        else:
            assert values == first["rows"][key]
    if name not in ("ewc", "inf_lora", "gain_lora"):  # what they look at between fits every rank computes in full
        counts = ("forward_examples", "backward_examples", "validated_examples")
        assert [[c[key] for key in counts] for c in alone["costs"]] == [
            [c[key] for key in counts] for c in first["costs"]
        ]


def results(root: Path) -> dict:
    (path,) = root.glob("*/*/s*/results.json")
    return json.loads(path.read_text())


def answers(root: Path) -> list:
    """Every prediction after every task."""
    return [pyarrow.parquet.read_table(path).to_pylist() for path in sorted(root.glob("*/*/s*/predictions/*.parquet"))]


TWO = ["hardware.ranks=2", "cache_dir=null", "train.epochs=1"]


@pytest.mark.slow
def test_a_sharded_run_saves_adapters_that_load_on_one_rank(words: Path, clpet, tmp_path: Path) -> None:
    """With an odd last batch in micro-batches of three, so that one rank has less to do than the other."""
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
    found = clpet(*args, "hardware.shard=true", "hardware.gradient_checkpointing=true", "output_dir=two")
    assert (found.code, found.err) == (0, "")
    assert found.out.count("learning accuracy") == 0  # the ranks write to the terminal itself
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["scores"] == two["scores"]
    assert answers(tmp_path / "one") == answers(tmp_path / "two")
    assert (two["batch"]["devices"], two["parameters"]) == (2, one["parameters"])
    places = [next((tmp_path / name).glob("*/*/s*/adapters/default")) for name in ("one", "two")]
    tensors = [load_file(place / "adapter_model.safetensors") for place in places]
    assert same(*tensors, tolerance=1e-5)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=266, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = PeftModel.from_pretrained(LlamaModel(config), places[1])
    assert torch.isfinite(model(torch.tensor([[5, 6]])).last_hidden_state).all()


@pytest.mark.slow
def test_an_error_of_a_rank_ends_all_with_one_line(words: Path, clpet, tmp_path: Path) -> None:
    found = clpet("train", "method=sequential", *tiny_args(words), *TWO, "train.lr=1e30")
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert found.err.startswith("clpet: the loss of task 1")
    assert list(tmp_path.glob("outputs/*/*/s*/results.json")) == []


def killed() -> None:
    """The second of two ranks is killed; the first waits for it."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        if ranks.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other() -> None:
    with pytest.raises(RankError, match=r"rank \d (was killed \(SIGKILL\)|or another one has ended unheard)"):
        start(2, killed)


@pytest.mark.slow
def test_tasks_of_a_slurm_step_are_ranks(words: Path, clpet, tmp_path: Path) -> None:
    """Two processes that srun would have started, told apart by its variables alone."""
    args = ["train", "method=sequential", *tiny_args(words), "cache_dir=null", "train.epochs=1"]
    command = [sys.executable, "-m", "clpet", *args, "hardware.ranks=auto", "output_dir=two"]
    said = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    tasks = [
        subprocess.Popen(command, env={**os.environ, **said, "SLURM_PROCID": place, "SLURM_LOCALID": place}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for place in "01"
    ]  # fmt: skip
    (first, error), (second, _) = (task.communicate(timeout=300) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], error
    assert "learning accuracy" in first
    assert second == ""
    assert clpet(*args, "output_dir=one").code == 0
    assert results(tmp_path / "one")["scores"] == results(tmp_path / "two")["scores"]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(words: Path, clpet, tmp_path: Path) -> None:
    """A signal to the launcher: both ranks stop at the same step; one process ends what two have begun."""
    args = ["train", "method=kif", *tiny_args(words), "train.epochs=10", "cache_dir=null", "train.save_minutes=0.002"]
    assert clpet(*args, "output_dir=whole").code == 0
    with stopped_at(tmp_path / "cut", SIGNAL := signal.SIGUSR2):
        cut = clpet(*args, "hardware.ranks=2", "output_dir=cut")
    assert cut.code == EXIT_TEMPFAIL
    assert f"stopped by {SIGNAL.name}" in cut.err
    again = clpet(*args, "output_dir=cut")
    assert again.code == 0
    assert "resuming after" in again.out
    one, two = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert same(one["scores"], two["scores"], tolerance=1e-4)
    assert [cost["backward_examples"] for cost in one["cost"]] == [cost["backward_examples"] for cost in two["cost"]]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_two_bit_for_bit(words: Path, clpet, tmp_path: Path) -> None:
    """Every rank goes on with its own dropout."""
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
    """Signals this process once a run in the folder has written a checkpoint inside of a task."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if any("-" in path.name for path in root.glob("*/*/s*/state/0*")):
                os.kill(os.getpid(), signum)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
