"""What a run leaves on disk to go on from: checkpoints between tasks, written whole or not at all."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clpet.errors import ConfigError
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.runtime.atomic_io import replace_folder, write_synced
from clpet.runtime.distributed import get_world

log = logging.getLogger(__name__)

_TENSOR = "__tensor__"


@dataclass
class RunState:
    """Where a run stands after `done` entries of its curriculum; `task` is what it left of the next one."""

    matrix: TransferMatrix
    own: TransferMatrix
    done: int = 0
    costs: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, float]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None  # averages on validation after the last task

    def figures(self) -> dict[str, Any]:
        """What was measured so far."""
        return {
            "done": self.done,
            "matrix": self.matrix.to_json(),
            "own": self.own.to_json(),
            "costs": list(self.costs),
            "diagnostics": list(self.diagnostics),
            "validation": self.validation,
        }

    def save(self, folder: Path, method_state: dict[str, Any], identity: dict[str, str]) -> None:
        """Writes `folder`/NNN, NNN = done. Raises HostError when the disk refuses."""
        value = {"identity": identity, **self.figures(), "method": method_state, "trainer": self.trainer}
        _keep(folder, (self.done,), value)

    def task_writer(self, folder: Path, identity: dict[str, str]) -> Callable[[int, dict[str, Any]], None]:
        """What writes a state of the task that comes next as `folder`/NNN-SSSSSS, S its number.

        It holds the task alone: what was there before lies in NNN, or, before the first task, is a fresh method.
        """
        done, value = self.done, {"identity": identity, **self.figures()}
        return lambda number, task: _keep(folder, (done, number), {**value, "task": task})

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, str]) -> "tuple[RunState, dict[str, Any]] | None":
        """(state, method state) of the newest whole checkpoint, None when there is none; no method state: a fresh one.

        A damaged checkpoint is passed over for the one before it. Raises ConfigError when the run was started
        on other data, weights or code or by another configuration. An identity's parts that it did not have
        are not compared.
        """
        for place in reversed(checkpoints(folder)):
            try:
                value = {"method": {}, "trainer": {}, "task": None, **read_tree(place)}
                if value["task"] and value["done"]:
                    before = read_tree(folder / _name((value["done"],)))
                    value |= {key: before[key] for key in ("method", "trainer")}
            except ValueError as error:
                log.warning("%s: the checkpoint before %s is used", error, place.name)
                continue
            for key, was in value["identity"].items():
                if (now := identity.get(key, was)) != was:
                    raise ConfigError(
                        f"{folder.parent} was started with {key} {was}, now it is {now}: "
                        "start over with fresh=true, or use another output_dir"
                    )
            matrix, own = TransferMatrix.from_json(value["matrix"]), TransferMatrix.from_json(value["own"])
            rest = value["trainer"], value["task"], value.get("validation")
            return cls(matrix, own, value["done"], value["costs"], value["diagnostics"], *rest), value["method"]
        if checkpoints(folder):
            log.warning("no whole checkpoint is left in %s: the run starts over", folder)
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"\d+(-\d+)?", path.name)), key=_order)


def _order(place: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in place.name.split("-"))


def _name(order: tuple[int, ...]) -> str:
    return "-".join(f"{number:0{width}d}" for number, width in zip(order, (3, 6), strict=False))


def _keep(folder: Path, order: tuple[int, ...], value: dict[str, Any]) -> None:
    """Writes a checkpoint; besides it stay the two newest between tasks and the one before it inside its task.

    Of several ranks the main one writes.
    """
    if not get_world().is_main:
        return
    for newer in checkpoints(folder):
        if _order(newer) > order:  # damaged, or it belongs to one that was
            shutil.rmtree(newer)
    write_tree(folder / _name(order), value)
    between = [place for place in checkpoints(folder) if len(_order(place)) == 1]
    inside = [place for place in checkpoints(folder) if _order(place)[0] == order[0] and place not in between]
    kept = [*between[-2:], *inside[-2:]]
    for old in [*checkpoints(folder), *folder.glob(".*")]:  # what starts with a dot was cut off in writing
        if old not in kept:
            shutil.rmtree(old)


def write_tree(place: Path, tree: dict[str, Any]) -> None:
    """Saves nested dicts and lists of tensors, numbers and strings as JSON and safetensors, atomically."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _split(tree, "", tensors)
    with replace_folder(place) as folder:
        save_file(tensors, folder / "tensors.safetensors")
        plain["sha256"] = _checksum(folder / "tensors.safetensors", plain)
        write_synced(folder / "state.json", json.dumps(plain))


def read_tree(place: Path) -> dict[str, Any]:
    """The inverse of `write_tree`. Raises ValueError when the files are damaged."""
    try:
        plain = json.loads((place / "state.json").read_text())
        if plain.pop("sha256") == _checksum(place / "tensors.safetensors", plain):
            loaded = load_file(place / "tensors.safetensors")
            # A file's tensors begin anywhere, and sums over memory that is aligned differently round differently.
            return _join(plain, {name: tensor.clone() for name, tensor in loaded.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{place} is damaged ({error})") from error
    raise ValueError(f"{place} is damaged (its checksum is another)")


def copied(node: Any) -> Any:
    """A tree whose tensors are copies in the host's memory."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return [copied(value) for value in node] if isinstance(node, list | tuple) else node


def _split(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(node, dict):
        return {str(key): _split(value, f"{path}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_split(value, f"{path}/{index}", tensors) for index, value in enumerate(node)]
    return node


def _join(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if node.keys() == {_TENSOR}:
            return tensors[node[_TENSOR]]
        return {key: _join(value, tensors) for key, value in node.items()}
    return [_join(value, tensors) for value in node] if isinstance(node, list) else node


def _checksum(tensors: Path, plain: dict[str, Any]) -> str:
    with tensors.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    found.update(json.dumps(plain).encode())
    return found.hexdigest()
