"""A task that is cut off inside a fit goes on at its step and ends bit for bit as it would have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clpet.halfway import Keeper
from clpet.state import read_tree, write_tree

SMALL = "train.global_batch_size=4"  # 6 steps an epoch


class Cut(Exception):
    """Stands for the end of a process."""


def same(one: Any, two: Any) -> bool:
    """Whether two trees hold the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def keeping(run: SimpleNamespace, index: int, write: Any, record: dict | None = None, every: float = 1e-9) -> None:
    """Learns a task; every step is written with `write`."""
    run.trainer.keeper = Keeper(run.method, every)
    run.trainer.begin_task(index, last=index == 2)
    run.trainer.keeper.begin(record, write)
    run.method.learn(run.benchmark.tasks[index], index, run.trainer)
    run.method.after_task(run.benchmark.tasks[index], index)


def counted(run: SimpleNamespace) -> dict:
    """What the task's learning cost, save for time and memory."""
    cost = run.method.objective.meter.take_learning()
    return {key: value for key, value in cost.items() if key not in ("seconds", "peak_memory_mb")}


def cut_at(make, overrides: list[str], place: Path, writes: int, before: int = 1) -> tuple[SimpleNamespace, int]:
    """A fresh run that goes on with task `before` after write number `writes` of it; and that write's number."""
    run = make(*overrides)
    for index in range(before):
        run.learn(index)
    write_tree(place / "before", {"method": run.method.state_dict(), "trainer": run.trainer.state()})
    numbers = []

    def write(number: int, record: dict) -> None:
        write_tree(place / "inside", record)
        numbers.append(number)
        if len(numbers) == writes:
            raise Cut

    with pytest.raises(Cut):
        keeping(run, before, write)
    assert numbers == sorted(set(numbers))
    again, held = make(*overrides), read_tree(place / "before")
    again.method.load_state_dict(held["method"])
    again.trainer.load(held["trainer"])
    keeping(again, before, lambda *_: None, read_tree(place / "inside"))
    return again, numbers[-1]


VARIANTS = {
    "plain": ["method=sequential"],
    "dropout": ["method=sequential", "peft.dropout=0.3", "train.clip=1", "train.schedule=cosine"],
    "best": ["method=replay", "replay=reservoir", "train.select=best", "train.lr=1e-2"],
    "full": ["method=sequential", "peft=none", "train.lr=1e-4", "train.optimizer_state=carry", "train.schedule=ar"],
    "dynamic_conpet": ["method=dynamic_conpet", "method.top_k=2", "train.select=best"],
    "crl": ["method=crl"],
    "crl_star": ["method=crl", "replay=dynamic", "method.sample=20"],
    "ea_emr": ["method=ea_emr", "replay=dynamic"],
    "slm": ["method=slm", "method.stage1.min_steps=20"],
    "kif": ["method=kif", "train.select=best"],
    "kif_after": ["method=kif", "replay=share", "replay.share=0.5", "method.replay_phase=after", "method.gradient=raw"],
    "recurrent_kif": ["method=recurrent_kif", "replay=all", "method.inner_steps=3", "method.outer_steps=2"],
    "lwf": ["method=lwf"],
    "ewc": ["method=ewc"],
    "mocl": ["method=mocl"],
    "sapt": ["method=sapt"],
    "gain_lora": ["method=gain_lora", "peft.dropout=0.3"],
    "progressive_prompts": ["method=progressive_prompts"],
    "osf": ["method=osf"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_task_cut_off_inside_a_fit_ends_bit_for_bit_like_uninterrupted(name: str, make, tmp_path: Path) -> None:
    """In the middle of the first epoch, and 16 steps on: in another epoch, at the end of a fit, or in the next one."""
    overrides = [*VARIANTS[name], SMALL]
    whole = make(*overrides)
    whole.learn(0)
    keeping(whole, 1, lambda *_: None)
    state, cost = whole.method.state_dict(), counted(whole)
    for writes in (4, 13):
        again, number = cut_at(make, overrides, tmp_path, writes)
        assert number == writes
        assert same(state, again.method.state_dict())
        assert same(whole.trainer.state(), again.trainer.state())
        assert cost == counted(again)
