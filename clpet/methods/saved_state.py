"""Saves, restores and counts the attributes that a method lists as its state, so that no method does so by hand.

An entry of such a list is "attribute", or "attribute=key" if the checkpoint has it under another key; a dot leads into
an attribute's attribute, or in a key into a nested dict. Values may be tensors, parameters, modules, numpy arrays and
generators, numbers, strings, objects with `state` and `load`, and lists and dicts of them. None is left out.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from clpet.records import State, Tree
from clpet.runtime.sharding.tensors import aligned

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Component(Protocol):
    """An object that saves itself. With a method `count()` it also tells how many scalars it stores."""

    def state(self) -> Any:
        """Returns the state as a tree of tensors and JSON values."""

    def load(self, state: Any) -> None:
        """Restores what `state` returned."""


class Growing(list[M]):
    """A list of modules that grows from task to task; `new` makes one, into which saved values are loaded."""

    def __init__(self, new: Callable[[], M]) -> None:
        super().__init__()
        self.new = new

    def state(self) -> list[Tree]:
        """Returns the state of every module."""
        return [packed(module) for module in self]

    def load(self, state: list[Tree]) -> None:
        """Restores what `state` returned."""
        self[:] = [cast(M, restored(self.new(), saved, None)) for saved in state]


def entries(owner: object, *lists: str) -> Iterator[tuple[str, str]]:
    """Yields (attribute, key) from the class variables `lists` of an object's classes, base classes first."""
    for cls in reversed(type(owner).__mro__):
        for name in lists:
            for entry in vars(cls).get(name, ()):
                attribute, _, key = entry.partition("=")
                yield attribute, key or attribute


def save(owner: object, *lists: str) -> State:
    """Returns the attributes in the class variables `lists` as nested dicts."""
    state: State = {}
    for attribute, key in entries(owner, *lists):
        value = attrgetter(attribute)(owner)
        if value is None:
            continue
        *path, last = key.split(".")
        node = state
        for name in path:
            node = cast(State, node.setdefault(name, {}))
        node[last] = packed(value)
    return state


def load(owner: object, state: Mapping[str, Tree], device: torch.device | None, *lists: str) -> None:
    """Restores what `save` returned. Tensors in lists and dicts are moved to `device`; None leaves them."""
    for attribute, key in entries(owner, *lists):
        holder, _, name = attribute.rpartition(".")
        parent = attrgetter(holder)(owner) if holder else owner
        current = getattr(parent, name)
        if current is None:
            continue
        saved: Tree = state
        for name_in_path in key.split("."):
            saved = cast(Mapping[str, Tree], saved)[name_in_path]
        value = restored(current, saved, device)
        if value is not current:
            setattr(parent, name, value)


def packed(value: object) -> Tree:
    """A value as a tree of tensors and JSON values."""
    if isinstance(value, Component):
        return cast(Tree, value.state())
    if isinstance(value, nn.ParameterList):
        return list(value)
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if isinstance(value, np.random.Generator):
        return cast(Tree, value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return cast(Tree, value.tolist())
    if isinstance(value, Mapping):
        return {str(key): packed(item) for key, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, list | tuple) else cast(Tree, value)


def restored(current: object, saved: Any, device: torch.device | None) -> object:
    """The value that `packed` has turned into `saved`; `current` is the attribute's value in a new method."""
    if isinstance(current, Component):
        current.load(saved)
    elif isinstance(current, nn.ParameterList):
        return nn.ParameterList([tensor.to(device) for tensor in saved])
    elif isinstance(current, nn.Module):
        current.load_state_dict(saved)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = saved
    elif isinstance(current, np.ndarray):
        return np.array(saved, dtype=current.dtype)
    elif isinstance(current, nn.Parameter):
        if current.shape != saved.shape:  # a module may hold it: where possible it stays the same object
            return nn.Parameter(saved.to(current.device, copy=True))
        with torch.no_grad():
            current.copy_(aligned(saved, current))
    elif isinstance(current, Tensor):
        return saved.to(current.device, copy=True)
    else:
        return moved(saved, device)
    return current


def moved(saved: Tree, device: torch.device | None) -> object:
    """A tree with its tensors on a device and its dicts' integer keys restored, which JSON turns into strings."""
    if isinstance(saved, Tensor):
        return saved if device is None else saved.to(device, copy=True)
    if isinstance(saved, Mapping):
        return {int(key) if str(key).isdecimal() else key: moved(item, device) for key, item in saved.items()}
    return [moved(item, device) for item in saved] if isinstance(saved, list | tuple) else saved


def count_saved(owner: object) -> int:
    """Number of scalars in the attributes that an object lists in `saved`."""
    return sum(count(attrgetter(attribute)(owner)) for attribute, _ in entries(owner, "saved"))


def count(value: object) -> int:
    """Number of scalars in the tensors of a value."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, nn.Module):
        return sum(parameter.numel() for parameter in value.parameters())
    if isinstance(value, Mapping):
        return sum(count(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(count(item) for item in value)
    counter = getattr(value, "count", None) if isinstance(value, Component) else None
    return counter() if counter else 0
