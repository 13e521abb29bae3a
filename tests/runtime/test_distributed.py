"""Ranks in one process: which rows each computes, flat buffers, and the options that need special hardware."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clpet.data.batches import EncodedDataset
from clpet.data.micro_batches import MicroBatchLimits
from clpet.runtime.distributed import World, get_world, rows_of_rank, sum_flat
from tests.conftest import tiny_args


def test_the_rows_of_a_batch_are_divided_evenly_over_ranks() -> None:
    rows = np.arange(10, 21)
    rows_by_rank = [rows_of_rank(rows, index, 4) for index in range(4)]
    assert [rows.tolist() for rows in rows_by_rank] == [[10, 14, 18], [11, 15, 19], [12, 16, 20], [13, 17]]
    assert [len(rows_of_rank(rows[:2], index, 3)) for index in range(3)] == [1, 1, 0]
    assert rows_of_rank(rows, 0, 1) is rows


def test_ranks_of_a_sharded_backbone_run_equally_many_passes() -> None:
    """Five rows in micro-batches of two: rank 0 has 3 rows and so two passes, rank 1 has 2 rows and repeats one."""
    ranks = [World(), World()]
    for index, rank in enumerate(ranks):
        rank.size, rank.index, rank.sharded = 2, index, True

    def divide(rows: np.ndarray) -> list[np.ndarray]:
        return MicroBatchLimits(2).divide(EncodedDataset([], [], [], 0), rows)

    batches = [[(rows.tolist(), counts) for rows, counts in rank.micro_batches(np.arange(5), divide)] for rank in ranks]
    assert batches == [[([0, 2], True), ([4], True)], [([1, 3], True), ([0], False)]]
    assert [[counts for _, counts in rank.micro_batches(np.array([7]), divide)] for rank in ranks] == [[True], [False]]
    ranks[1].sharded = False
    assert ranks[1].micro_batches(np.array([7]), divide) == []


def test_flat_buffers_sum_every_tensor_in_place() -> None:
    """Like two ranks with equal gradients: every value doubles. A buffer has one dtype and at most `limit` scalars."""
    tensors = [torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.tensor(5.0), torch.ones(4)]
    sizes: list[tuple[torch.dtype, int]] = []

    def double(flat: torch.Tensor) -> None:
        sizes.append((flat.dtype, len(flat)))
        flat *= 2

    sum_flat(tensors, double, limit=8)
    assert [tensor.tolist() for tensor in tensors] == [[[0, 2, 4], [6, 8, 10]], [2, 2], 10, [2, 2, 2, 2]]
    assert sorted(sizes, key=str) == [(torch.bfloat16, 2), (torch.float32, 4), (torch.float32, 7)]


def test_in_a_single_process_every_call_is_a_no_op() -> None:
    world = get_world()
    assert (world.size, world.is_main, world.gather(3), world.all_reduce_max(2, 5)) == (1, True, [3], (2, 5))
    assert world.claim("name")
    assert world.map(lambda number: number + 1, [1, 2]) == [2, 3]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method=sequential", "hardware.ranks=0"], "hardware.ranks must be auto, or a number of processes, not 0"),
        (["method=osf", "peft=osf", "hardware.shard=true"], "hardware.shard does not support peft=osf"),
        (
            ["method=sequential", "peft=none", "train.optimizer=muon", "hardware.shard=true"],
            "train.optimizer=muon does not support",
        ),
        (["method=sequential", "hardware.replicas=2"], "hardware.replicas must be 1 without hardware.shard=true"),
        (
            ["method=sequential", "hardware.shard=true", "hardware.ranks=3", "hardware.replicas=2"],
            "hardware.replicas=2 must divide the 3 ranks of the run",
        ),
        (["method=sequential", "hardware.quantization=nf4"], "hardware.quantization=nf4 needs a CUDA device"),
        (["hardware.gradient_checkpointing=true", "method=o_lora"], "cannot be used with method=o_lora"),
    ],
)
def test_unsupported_hardware_options_are_rejected_in_one_line(
    words: list[str], line: str, clpet, tmp_path: Path
) -> None:
    result = clpet("train", *tiny_args(tmp_path), *words)
    assert (result.code, result.err.count("\n")) == (1 if "nf4" in line else 2, 1)
    assert line in result.err


@pytest.mark.parametrize("model", [["model=tiny", "peft=lora"], ["model=tiny_llama"], ["model=tiny", "peft=none"]])
def test_gradient_checkpointing_changes_rounding_only(model: list[str], make) -> None:
    """Sums may be computed in another order; a wrong dropout mask or a cache written twice would differ by far more."""
    plain, recomputed = (
        make("method=sequential", "train.epochs=1", *model, f"hardware.gradient_checkpointing={on}")
        for on in ("false", "true")
    )
    for run in (plain, recomputed):
        run.learn(0)
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in (plain, recomputed)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])
