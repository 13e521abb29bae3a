"""Checkpoints of a run, from which it resumes: one after every task, and some inside a task. Written atomically."""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clpet.errors import ConfigError
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Checkpoint, Cost, ExtendedFrom, Json, Measurements, Metrics, State, Tree
from clpet.runtime.atomic_io import replace_folder, write_synced
from clpet.runtime.distributed import get_world, is_sharded
from clpet.runtime.sharding.files import read_shards, write_shards
from clpet.runtime.sharding.tensors import copied
from clpet.runtime.tree_size import tree_bytes

T = TypeVar("T")
log = logging.getLogger(__name__)

_TENSOR = "__tensor__"  # {_TENSOR: name} in state.json refers to a tensor of tensors.safetensors


@dataclass
class RunState:
    """Progress of a run after `done` entries of its curriculum; `task` is the saved progress inside the next entry."""

    matrix: TransferMatrix
    task_matrix: TransferMatrix  # scores where only the labels of each task compete
    done: int = 0
    costs: list[Cost] = field(default_factory=list)
    diagnostics: list[Metrics] = field(default_factory=list)
    trainer: State = field(default_factory=dict)
    task: State | None = None
    validation: dict[str, float] | None = None  # averages on validation after the last task
    extended_from: ExtendedFrom | None = None  # the run that has learned the first tasks, if it is another one

    def measurements(self) -> Measurements:
        """Everything measured so far, as JSON values."""
        return {
            "done": self.done,
            "matrix": self.matrix.to_json(),
            "own": self.task_matrix.to_json(),
            "costs": list(self.costs),
            "diagnostics": list(self.diagnostics),
            "validation": self.validation,
            "extended_from": self.extended_from,
        }

    def steps(self) -> tuple[int, bool]:
        """Optimiser steps up to this state, and whether everything that belongs to the last of them is done.

        It is not where the state is inside a fit: the validation of an epoch follows the checkpoint at its last step.
        """
        steps = sum(int(cost.get("steps", 0)) for cost in self.costs)
        if not self.task:
            return steps, True
        fit = cast(list[dict[str, Tree]], self.task["fits"])[-1]
        cost = cast(dict[str, int], fit["cost"])
        return steps + cost.get("steps", 0), "over" in fit

    def _tree(self) -> State:
        return cast(State, self.measurements())

    def save(self, folder: Path, method_state: State, identity: dict[str, str]) -> None:
        """Writes the checkpoint `folder`/NNN, NNN = done. Raises HostError when the disk refuses.

        The cost of the last task gets the size of the method's part of it.
        """
        if self.costs:
            self.costs[-1] = {**self.costs[-1], "stored_bytes": tree_bytes(method_state)}
        state: State = {"method": method_state, "trainer": self.trainer}
        _save(folder, (self.done,), {"identity": identity, **self._tree(), **state})

    def task_writer(self, folder: Path, identity: dict[str, str]) -> Callable[[int, State], None]:
        """Returns the function that writes a checkpoint inside the next task as `folder`/NNN-SSSSSS, S its number.

        It contains the progress of that task only. The state before the task is in NNN; before the first task the
        method is newly initialised.
        """
        done, value = self.done, {"identity": identity, **self._tree()}
        return lambda number, task: _save(folder, (done, number), {**value, "task": task})

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, str]) -> "tuple[RunState, State] | None":
        """Loads (state, method state) from the newest undamaged checkpoint; None if there is none.

        The method state is empty for a run that was stopped inside its first task. Raises ConfigError if the run was
        started with other data, weights, code or options. Identity fields that an older checkpoint lacks are not
        compared.
        """
        for path in reversed(checkpoints(folder)):
            try:
                value = before_task = cast(Checkpoint, read_tree(path))
                if value.get("task") and value["done"]:
                    before_task = cast(Checkpoint, read_tree(folder / _name((value["done"],))))
            except ValueError as error:
                log.warning("%s: using the checkpoint before %s", error, path.name)
                continue
            for key, recorded in value["identity"].items():
                if (current := identity.get(key, recorded)) != recorded:
                    raise ConfigError(
                        f"{folder.parent} was started with {key} {recorded}, now it is {current}: "
                        "start over with fresh=true, or use another output_dir"
                    )
            state = cls(
                TransferMatrix.from_json(value["matrix"]),
                TransferMatrix.from_json(value["own"]),
                value["done"],
                value["costs"],
                value["diagnostics"],
                before_task.get("trainer", {}),
                value.get("task"),
                value.get("validation"),
                value.get("extended_from"),
            )
            return state, before_task.get("method", {})
        if checkpoints(folder):
            log.warning("every checkpoint in %s is damaged: the run starts over", folder)
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted((path for path in paths if re.fullmatch(r"\d+(-\d+)?", path.name)), key=_order)


def _order(checkpoint: Path) -> tuple[int, ...]:
    """(done,) of a checkpoint after a task, (done, number) of one inside a task: tuples sort by age."""
    return tuple(int(number) for number in checkpoint.name.split("-"))


def _name(order: tuple[int, ...]) -> str:
    return "-".join(f"{number:0{width}d}" for number, width in zip(order, (3, 6), strict=False))


def _save(folder: Path, order: tuple[int, ...], value: State) -> None:
    """Writes a checkpoint and deletes old ones; all ranks must make this call.

    The two newest after a task and the two newest inside the same task remain, this one included: if one is damaged,
    the run can resume from the one before.
    """
    for newer in checkpoints(folder) if get_world().is_main else ():
        # The run resumed from before these checkpoints, so they are damaged or build on a damaged one.
        if _order(newer) > order:
            shutil.rmtree(newer)
    write_tree(folder / _name(order), value)
    if not get_world().is_main:
        return
    after_tasks = [path for path in checkpoints(folder) if len(_order(path)) == 1]
    inside_task = [path for path in checkpoints(folder) if _order(path)[0] == order[0] and path not in after_tasks]
    remaining = [*after_tasks[-2:], *inside_task[-2:]]
    for old in [*checkpoints(folder), *folder.glob(".*")]:  # hidden folders are leftovers of interrupted writes
        if old not in remaining:
            shutil.rmtree(old)


def write_tree(folder: Path, tree: Mapping[str, Tree]) -> None:
    """Saves nested dicts and lists of tensors, numbers and strings as JSON and safetensors, atomically.

    The main rank writes. If tensors are sharded, every rank writes its rows of them into a file of its own, before the
    main rank writes the rest and the JSON; all ranks must make this call.
    """
    tensors: dict[str, torch.Tensor] = {}
    shards: dict[str, torch.Tensor] = {}
    plain = {str(key): _extract_tensors(value, f"/{key}", tensors, shards) for key, value in tree.items()}
    if not (shards or get_world().is_main):
        return
    with replace_folder(folder) if get_world().is_main else contextlib.nullcontext(folder) as temporary:
        if shards:
            plain["shards"] = write_shards(temporary, shards)
        if get_world().is_main:
            save_file(tensors, temporary / "tensors.safetensors")
            plain["sha256"] = _checksum(temporary / "tensors.safetensors", plain)
            write_synced(temporary / "state.json", json.dumps(plain))
    if shards:
        get_world().barrier()  # the checkpoint is complete


def read_tree(folder: Path) -> State:
    """Loads what `write_tree` saved, sharded tensors as whole or as sharded ones, as the run's weights are.

    Raises ValueError when the files are damaged. All ranks of a sharded run must make this call.
    """
    try:
        plain: dict[str, Json] = json.loads((folder / "state.json").read_text())
        if plain.pop("sha256") == _checksum(folder / "tensors.safetensors", plain):
            loaded = load_file(folder / "tensors.safetensors")
            # Tensors in a file start at any offset, and sums over differently aligned memory round differently.
            # Copies are aligned like new tensors, so a resumed run stays equal bit for bit.
            tensors = {name: tensor.clone() for name, tensor in loaded.items()}
            if "shards" in plain:
                tensors |= read_shards(folder, cast(Mapping[str, str], plain.pop("shards")))
            return {key: _insert_tensors(value, tensors) for key, value in plain.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error})") from error
    raise ValueError(f"{folder} is damaged (its checksum does not match)")


def cpu_copy(node: T) -> T:
    """Returns a tree whose tensors are detached copies on the CPU, sharded ones on their device.

    Tuples become lists.
    """
    copy: object = node
    if isinstance(node, torch.Tensor):
        copy = copied(node) if is_sharded(node) else node.detach().to("cpu", copy=True)
    elif isinstance(node, dict):
        copy = {key: cpu_copy(value) for key, value in node.items()}
    elif isinstance(node, list | tuple):
        copy = [cpu_copy(value) for value in node]
    return cast(T, copy)


def _extract_tensors(node: Tree, path: str, tensors: dict[str, torch.Tensor], shards: dict[str, torch.Tensor]) -> Json:
    """Moves the tensors of a tree into `tensors`, or the sharded ones into `shards`, by path.

    Returns the tree with references in their stead.
    """
    if isinstance(node, torch.Tensor):
        if is_sharded(node):
            shards[path] = node.detach()
            return {_TENSOR: path}
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(node, dict):
        return {str(key): _extract_tensors(value, f"{path}/{key}", tensors, shards) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_extract_tensors(value, f"{path}/{index}", tensors, shards) for index, value in enumerate(node)]
    return cast(Json, node)


def _insert_tensors(node: Json, tensors: dict[str, torch.Tensor]) -> Tree:
    """Replaces the references of `_extract_tensors` by the tensors."""
    if isinstance(node, dict):
        if node.keys() == {_TENSOR}:
            return tensors[str(node[_TENSOR])]
        return {key: _insert_tensors(value, tensors) for key, value in node.items()}
    return [_insert_tensors(value, tensors) for value in node] if isinstance(node, list) else cast(Tree, node)


def _checksum(tensors: Path, plain: Mapping[str, Json]) -> str:
    with tensors.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256")
    checksum.update(json.dumps(plain).encode())
    return checksum.hexdigest()
