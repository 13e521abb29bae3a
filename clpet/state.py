"""What a run leaves on disk to go on from: checkpoints between tasks, written whole or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clpet.errors import ConfigError, HostError
from clpet.results import TransferMatrix

_TENSOR = "__tensor__"


@dataclass
class RunState:
    """Where a run stands after `done` entries of its curriculum."""

    matrix: TransferMatrix
    own: TransferMatrix
    done: int = 0
    costs: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path, method_state: dict[str, Any], identity: dict[str, str]) -> None:
        """Writes `folder`/NNN and then removes older checkpoints but one. Raises HostError when the disk refuses."""
        value = {
            "identity": identity,
            "done": self.done,
            "matrix": self.matrix.to_json(),
            "own": self.own.to_json(),
            "costs": self.costs,
            "diagnostics": self.diagnostics,
            "method": method_state,
        }
        write_tree(folder / f"{self.done:03d}", value)
        for old in [*checkpoints(folder)[:-2], *folder.glob(".*")]:  # what starts with a dot was cut off in writing
            shutil.rmtree(old)

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, str]) -> "tuple[RunState, dict[str, Any]] | None":
        """(state, method state) of the newest whole checkpoint, None when there is none.

        A damaged checkpoint is passed over for the one before it. Raises ConfigError when the run was started
        on other data or by another configuration.
        """
        for place in reversed(checkpoints(folder)):
            try:
                value = read_tree(place)
            except (OSError, ValueError, KeyError, SafetensorError):
                continue
            for key, now in identity.items():
                if value["identity"].get(key) != now:
                    raise ConfigError(
                        f"{folder.parent} was started with {key} {value['identity'].get(key)}, now it is {now}: "
                        "start over with fresh=true, or use another output_dir"
                    )
            matrix, own = TransferMatrix.from_json(value["matrix"]), TransferMatrix.from_json(value["own"])
            return cls(matrix, own, value["done"], value["costs"], value["diagnostics"]), value["method"]
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []


def write_tree(place: Path, tree: dict[str, Any]) -> None:
    """Saves nested dicts and lists of tensors, numbers and strings as JSON and safetensors, atomically."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _split(tree, "", tensors)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "tensors.safetensors")
        plain["sha256"] = _sha256(temporary / "tensors.safetensors")
        _write_synced(temporary / "state.json", json.dumps(plain))
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise HostError(f"the checkpoint {place} cannot be written: {error.strerror or error}") from error


def read_tree(place: Path) -> dict[str, Any]:
    """The inverse of `write_tree`. Raises ValueError when the files are damaged."""
    plain = json.loads((place / "state.json").read_text())
    if plain.pop("sha256") != _sha256(place / "tensors.safetensors"):
        raise ValueError(f"{place} is damaged")
    return _join(plain, load_file(place / "tensors.safetensors"))


def _split(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().cpu().contiguous().clone()
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file's text whole. Raises HostError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_synced(temporary, text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HostError(f"{path} cannot be written: {error.strerror or error}") from error


class Lock:
    """Holds a run directory for this process. Raises HostError when another process has it."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / ".lock").open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise HostError(f"another process is working in {out}: wait for it, or use another output_dir") from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
