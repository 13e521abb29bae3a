"""Attributes that a method lists are saved, restored and counted."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from clpet.methods import saved_state
from clpet.methods.components.importance import Importance


class Base:
    """Values of all kinds that a list may name."""

    saved = ("table=group.table", "layer.weight=group.weight")
    notes = ("labels=group.known",)

    def __init__(self) -> None:
        self.layer = nn.Linear(2, 1)
        self.table: dict[int, list[torch.Tensor]] = {}
        self.labels: list[int] = []


class Derived(Base):
    saved = ("keys", "rows", "rng", "importance", "absent", "heads", "mean")

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.mean = nn.ParameterList(), torch.zeros(0)
        self.rows, self.rng = np.empty(0, dtype=np.int64), np.random.default_rng(0)
        self.importance = Importance(2, "first", 0.5, 0.5, False)
        self.absent = None
        self.heads = saved_state.Growing(lambda: nn.Linear(1, 1))


def filled() -> Derived:
    owner = Derived()
    owner.table, owner.labels = {3: [torch.ones(2), torch.zeros(1)]}, [4, 1]
    owner.keys.append(nn.Parameter(torch.ones(3)))
    owner.rows, owner.mean = np.array([5, 6]), torch.ones(2, dtype=torch.float64)
    owner.rng.random(3)
    owner.importance.update([torch.ones(2)], [torch.ones(2)])
    owner.heads.append(nn.Linear(1, 1))
    return owner


def test_what_is_saved_is_restored() -> None:
    """Nested keys, integer keys of dicts, new lengths and dtypes; None is left out."""
    owner, new = filled(), Derived()
    state = saved_state.save(owner, "saved", "notes")
    assert state["group"]["known"] == [4, 1]
    assert list(state["group"]["table"]) == ["3"]
    assert "absent" not in state
    weight = new.layer.weight
    saved_state.load(new, state, torch.device("cpu"), "saved", "notes")
    assert new.layer.weight is weight
    assert torch.equal(weight, owner.layer.weight)
    assert [value.tolist() for value in new.table[3]] == [[1, 1], [0]]
    assert new.labels == [4, 1]
    assert isinstance(new.keys[0], nn.Parameter)
    assert new.rows.tolist() == [5, 6]
    assert new.rows.dtype == np.int64
    assert new.mean.dtype == torch.float64
    assert new.rng.random() == owner.rng.random()
    assert torch.equal(new.importance.mean, owner.importance.mean)
    assert torch.equal(new.heads[0].weight, owner.heads[0].weight)


def test_restored_tensors_are_copies() -> None:
    """The tree that was loaded may be written again, and must not change with the method."""
    owner, new = filled(), Derived()
    state = saved_state.save(owner, "saved")
    saved_state.load(new, state, torch.device("cpu"), "saved")
    new.mean.zero_()
    new.table[3][0].zero_()
    assert state["mean"].tolist() == [1, 1]
    assert state["group"]["table"]["3"][0].tolist() == [1, 1]


def test_tensors_are_counted() -> None:
    owner = filled()
    assert saved_state.count(owner.table) == 3
    assert saved_state.count(owner.keys) == 3
    assert saved_state.count(owner.heads) == 2
    assert saved_state.count([owner.rows, owner.rng, "text", 3, None]) == 0
    component = SimpleNamespace(state=dict, load=print, count=lambda: 7)
    assert saved_state.count(component) == 7
