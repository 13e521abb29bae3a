"""Checkpoints between tasks and inside one: what is kept, and what is used where one of them is damaged."""

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


def between(folder: Path, done: int) -> None:
    state(done).save(folder, {"weight": torch.full((2,), float(done))}, IDENTITY)


def inside(folder: Path, done: int, *numbers: int) -> None:
    write = state(done).task_writer(folder, IDENTITY)
    for number in numbers:
        write(number, {"fits": [torch.tensor([number])]})


def names(folder: Path) -> list[str]:
    return [place.name for place in checkpoints(folder)]


def found(folder: Path) -> tuple:
    """Entries done, the method's weight, and the number inside the task."""
    resumed = RunState.resume(folder, IDENTITY)
    assert resumed
    run, method = resumed
    return run.done, method.get("weight", torch.zeros(1))[0].item(), run.task and run.task["fits"][0].item()


def damage(place: Path, file: str = "tensors.safetensors") -> None:
    content = bytearray((place / file).read_bytes())
    content[-12] ^= 1
    (place / file).write_bytes(content)


def test_two_of_each_kind_are_kept(tmp_path: Path) -> None:
    inside(tmp_path, 0, 5, 7, 9)
    assert names(tmp_path) == ["000-000007", "000-000009"]
    between(tmp_path, 1)
    assert names(tmp_path) == ["001"]
    inside(tmp_path, 1, 3)
    between(tmp_path, 2)
    inside(tmp_path, 2, 3, 1000000, 1000001)
    assert names(tmp_path) == ["001", "002", "002-1000000", "002-1000001"]


def test_inside_a_task_the_method_is_that_of_before_it(tmp_path: Path) -> None:
    inside(tmp_path, 0, 5)
    assert found(tmp_path) == (0, 0, 5)
    between(tmp_path, 1)
    assert found(tmp_path) == (1, 1, None)
    inside(tmp_path, 1, 8)
    assert found(tmp_path) == (1, 1, 8)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    between(tmp_path, 1)
    between(tmp_path, 2)
    inside(tmp_path, 2, 4, 6)
    for place, expected in (("002-000006", (2, 2, 4)), ("002-000004", (2, 2, None)), ("002", (1, 1, None))):
        damage(tmp_path / place, file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert found(tmp_path) == expected
        assert f"{tmp_path / place} is damaged" in caplog.text
    damage(tmp_path / "001", file)
    assert RunState.resume(tmp_path, IDENTITY) is None
    assert "starts over" in caplog.text


def test_what_follows_a_damaged_checkpoint_does_not_outlive_it(tmp_path: Path) -> None:
    """A run that went back writes over what it does not trust."""
    between(tmp_path, 1)
    between(tmp_path, 2)
    inside(tmp_path, 2, 4)
    damage(tmp_path / "002")
    assert found(tmp_path) == (1, 1, None)
    inside(tmp_path, 1, 3)
    assert names(tmp_path) == ["001", "001-000003"]


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {"a": [1, 2.5, "x", None, True], "b": {"c": torch.arange(6).view(2, 3).T, "d": float("-inf"), "e": 2**100}}
    write_tree(tmp_path / "tree", tree)
    again = read_tree(tmp_path / "tree")
    assert torch.equal(again["b"].pop("c"), tree["b"].pop("c"))
    assert again == tree


def test_loaded_tensors_lie_in_memory_as_new_ones(tmp_path: Path) -> None:
    """At addresses of 64 bytes, whatever stands before them in the file."""
    write_tree(
        tmp_path / "tree",
        {"odd": torch.ones(3), "more": [torch.ones(5, 7), torch.ones(1, dtype=torch.uint8)], "z": torch.ones(9)},
    )
    again = read_tree(tmp_path / "tree")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (again["odd"], *again["more"], again["z"]))


def strided(node: Any, place: str = "") -> list[str]:
    """Places of a state whose tensors do not lie in memory as a loaded one would: sums over them round differently."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in items for found in strided(value, f"{place}/{key}")]
    if not isinstance(node, torch.Tensor) or not node.numel():
        return []
    return [place] if node.stride() != torch.empty(node.shape).stride() else []


@pytest.mark.slow
@pytest.mark.parametrize("method", methods_of("classification"))
def test_a_state_lies_in_memory_as_a_loaded_one_would(method: str, make) -> None:
    run = make(f"method={method}")
    for index in range(1 if method == "joint" else 2):
        run.learn(index)
        assert strided(run.method.state_dict()) == []
