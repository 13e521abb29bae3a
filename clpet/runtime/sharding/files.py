"""Files of sharded tensors: one per rank, in safetensors.

torch.distributed.checkpoint could write them too, but its own format has a pickled index, and its safetensors format
needs a planner, a second set of names, and files that are read without a checksum. Here a rank's file has its rows of
every sharded tensor under the same name; how many rows each file has says where they belong, so that any number of
ranks can read them. The names of the files and their checksums are in the JSON that is written last.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.runtime.atomic_io import as_host_error
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.tensors import from_rows, in_first_replica, is_dtensor, own_rows, shard_number

FILE_BYTES = 5 * 10**9  # of a file of a saved network


class PretrainedConfig(Protocol):
    """The part of a config of transformers that is written."""

    architectures: list[str]

    def save_pretrained(self, folder: Path) -> object: ...


class Slice(Protocol):
    """A tensor in a file of safetensors."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Writes this rank's rows of sharded tensors; returns the SHA-256 of every rank's file by name.

    `folder` is the main rank's. Raises HostError when the disk refuses. All ranks must make this call.
    """
    folder = get_world().gather(folder)[0]
    written: tuple[str, str] | None = None
    sharded = {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}
    mesh = next(iter(sharded.values())).device_mesh
    if in_first_replica(mesh):
        path = folder / f"shard-{shard_number(mesh):05d}.safetensors"
        with as_host_error(path):
            rows = {name: tensor.to_local().to("cpu", copy=True).contiguous() for name, tensor in sharded.items()}
            save_file(rows, path)
            written = (path.name, _sha256(path))
    return dict(sorted(pair for pair in get_world().gather(written) if pair))


def read_shards(folder: Path, checksums: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads sharded tensors: whole, or of a network with sharded weights this rank's rows.

    Raises ValueError if they are damaged or have names that `write_shards` does not give: a checkpoint may come from
    somebody else. Each rank of such a network examines some of the files, and all agree.
    """
    if foreign := [name for name in checksums if not re.fullmatch(r"shard-\d{5}\.safetensors", name)]:
        raise ValueError(f"{foreign[0]!r} is not the name of a shard")
    world = get_world()
    sharded = world.mesh is not None
    mine = sorted(checksums)[world.index :: world.size] if sharded else sorted(checksums)
    damaged = [name for name in mine if not _intact(folder / name, checksums[name])]
    if world.all_reduce_max(len(damaged))[0] if sharded else damaged:
        raise ValueError(f"a shard does not have its checksum: {', '.join(damaged) or 'on another rank'}")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / name, "pt")) for name in sorted(checksums)]
        return {name: _read([file.get_slice(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118


def write_model(model: nn.Module, folder: Path, limit: int = FILE_BYTES) -> None:
    """Writes a sharded network for from_pretrained, in files of at most `limit` bytes or one tensor.

    The main rank writes; it never holds more than one file of whole tensors. All ranks must make this call.
    """
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    for name, value in _weights(model):
        full = (value.full_tensor() if is_dtensor(value) else value).to("cpu").contiguous()
        if not get_world().is_main:
            continue
        if pending and sum(tensor.nbytes for tensor in pending.values()) + full.nbytes > limit:
            files.append(_flush(pending, folder, len(files)))
        pending[name] = full
    if get_world().is_main:
        files.append(_flush(pending, folder, len(files)))
        _write_index(files, folder)
        config = cast(PretrainedConfig, model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        if generation := getattr(model, "generation_config", None):
            generation.save_pretrained(folder)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a network is saved with, tied ones once."""
    parameters = dict(model.named_parameters())
    yield from ((name, value.detach()) for name, value in parameters.items())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from ((name, value) for name, value in model.state_dict().items() if name not in tied)


def _flush(pending: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    """Writes tensors into file `number`; returns their names."""
    names = list(pending)
    save_file(pending, folder / _part(number), metadata={"format": "pt"})
    pending.clear()
    return names


def _part(number: int) -> str:
    return f"model-{number + 1:05d}.safetensors"


def _write_index(files: Sequence[Sequence[str]], folder: Path) -> None:
    """Names the files as transformers does, and writes which tensor is in which."""
    if len(files) == 1:
        (folder / _part(0)).replace(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(number)).replace(folder / name)
        where |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2))


def _read(slices: Sequence[Slice]) -> Tensor:
    """One tensor from its rows in all files."""
    counts = [one.get_shape()[0] for one in slices]
    if any(one.get_shape()[1:] != slices[0].get_shape()[1:] for one in slices):
        raise ValueError("the rows of a tensor differ in shape between shards")
    mesh = get_world().mesh
    start, stop = (0, sum(counts)) if mesh is None else own_rows(sum(counts), mesh)
    rows = torch.cat(list(_between(slices, counts, start, stop)))
    return rows if mesh is None else from_rows(rows, sum(counts))


def _between(slices: Sequence[Slice], counts: Sequence[int], start: int, stop: int) -> Iterator[Tensor]:
    """The rows from `start` to `stop` of a tensor, from each file that has some; at least one tensor without rows."""
    first = 0
    yield slices[0][0:0]
    for one, count in zip(slices, counts, strict=True):
        begin, end = max(start - first, 0), min(stop - first, count)
        if begin < end:
            yield one[begin:end]
        first += count


def _intact(path: Path, checksum: str) -> bool:
    try:
        return path.is_file() and _sha256(path) == checksum  # a device has no end
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
