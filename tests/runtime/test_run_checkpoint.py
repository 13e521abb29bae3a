"""Checkpoints after tasks and inside a task: which remain, and which is used when one of them is damaged."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.runtime.run_checkpoint import RunState, checkpoints, read_tree, write_tree
from tests.conftest import methods_of

IDENTITY = {"signature": "s"}


def state(done: int) -> RunState:
    return RunState(TransferMatrix(["a", "b"]), TransferMatrix(["a", "b"]), done)


def save_after_task(folder: Path, done: int) -> None:
    state(done).save(folder, {"weight": torch.full((2,), float(done))}, IDENTITY)


def save_inside_task(folder: Path, done: int, *numbers: int) -> None:
    write = state(done).task_writer(folder, IDENTITY)
    for number in numbers:
        write(number, {"fits": [torch.tensor([number])]})


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def resumed(folder: Path) -> tuple:
    """(entries done, weight of the method, number of the checkpoint inside the task) of a resumed run."""
    state_and_method = RunState.resume(folder, IDENTITY)
    assert state_and_method
    run, method = state_and_method
    return run.done, method.get("weight", torch.zeros(1))[0].item(), run.task and run.task["fits"][0].item()


def damage(checkpoint: Path, file: str = "tensors.safetensors") -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[-12] ^= 1
    (checkpoint / file).write_bytes(content)


def test_two_checkpoints_of_each_kind_remain(tmp_path: Path) -> None:
    save_inside_task(tmp_path, 0, 5, 7, 9)
    assert names(tmp_path) == ["000-000007", "000-000009"]
    save_after_task(tmp_path, 1)
    assert names(tmp_path) == ["001"]
    save_inside_task(tmp_path, 1, 3)
    save_after_task(tmp_path, 2)
    save_inside_task(tmp_path, 2, 3, 1000000, 1000001)
    assert names(tmp_path) == ["001", "002", "002-1000000", "002-1000001"]


def test_inside_a_task_the_method_state_is_that_before_the_task(tmp_path: Path) -> None:
    save_inside_task(tmp_path, 0, 5)
    assert resumed(tmp_path) == (0, 0, 5)
    save_after_task(tmp_path, 1)
    assert resumed(tmp_path) == (1, 1, None)
    save_inside_task(tmp_path, 1, 8)
    assert resumed(tmp_path) == (1, 1, 8)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_after_task(tmp_path, 1)
    save_after_task(tmp_path, 2)
    save_inside_task(tmp_path, 2, 4, 6)
    for name, expected in (("002-000006", (2, 2, 4)), ("002-000004", (2, 2, None)), ("002", (1, 1, None))):
        damage(tmp_path / name, file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resumed(tmp_path) == expected
        assert f"{tmp_path / name} is damaged" in caplog.text
    damage(tmp_path / "001", file)
    assert RunState.resume(tmp_path, IDENTITY) is None
    assert "starts over" in caplog.text


def test_checkpoints_after_a_damaged_one_are_deleted(tmp_path: Path) -> None:
    """A run that resumed from before them replaces them."""
    save_after_task(tmp_path, 1)
    save_after_task(tmp_path, 2)
    save_inside_task(tmp_path, 2, 4)
    damage(tmp_path / "002")
    assert resumed(tmp_path) == (1, 1, None)
    save_inside_task(tmp_path, 1, 3)
    assert names(tmp_path) == ["001", "001-000003"]


def test_a_tree_is_read_as_it_was_written(tmp_path: Path) -> None:
    tree = {"a": [1, 2.5, "x", None, True], "b": {"c": torch.arange(6).view(2, 3).T, "d": float("-inf"), "e": 2**100}}
    write_tree(tmp_path / "tree", tree)
    loaded = read_tree(tmp_path / "tree")
    assert torch.equal(loaded["b"].pop("c"), tree["b"].pop("c"))
    assert loaded == tree


def test_loaded_tensors_are_aligned_like_new_ones(tmp_path: Path) -> None:
    """At multiples of 64 bytes, wherever they start in the file."""
    write_tree(
        tmp_path / "tree",
        {"odd": torch.ones(3), "more": [torch.ones(5, 7), torch.ones(1, dtype=torch.uint8)], "z": torch.ones(9)},
    )
    loaded = read_tree(tmp_path / "tree")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (loaded["odd"], *loaded["more"], loaded["z"]))


def strided(node: Any, path: str = "") -> list[str]:
    """Paths of the tensors in a state that are not contiguous: unlike a loaded tensor, so sums would round differently."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [child for key, value in items for child in strided(value, f"{path}/{key}")]
    if not isinstance(node, torch.Tensor) or not node.numel():
        return []
    return [path] if node.stride() != torch.empty(node.shape).stride() else []


@pytest.mark.slow
@pytest.mark.parametrize("method", methods_of("classification"))
def test_the_tensors_of_a_state_are_contiguous(method: str, make) -> None:
    run = make(f"method={method}")
    for index in range(1 if method == "joint" else 2):
        run.learn(index)
        assert strided(run.method.state_dict()) == []
