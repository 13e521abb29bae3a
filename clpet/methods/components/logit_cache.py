"""Outputs of frozen modules are cached: logits are computed once per example and stored on disk for later runs.

A frozen module's output for an example never changes, so it can be looked up, provided that the lookup gives the same
bits as computing it. Rounding depends on the shape of a batch but not on the other examples in it; therefore an
example always goes through the network in a block of the same shape (`blocks`). A run's result then depends neither
on the previous contents of the cache nor on the process that filled it.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.identity import digest
from clpet.data.batches import EncodedDataset
from clpet.models.fixed_blocks import BLOCK_ROWS, WIDTH_MULTIPLE, block_widths, rounding_platform, split_into_blocks
from clpet.models.protocols import config_of
from clpet.objectives.classification import Classification
from clpet.runtime import atomic_io
from clpet.runtime.distributed import full_tensor, get_world

BARE = "bare backbone"  # name of the frozen module that has no adapter


class LogitCache:
    """Logits by frozen module and split; with `folder` = None they are stored in memory only."""

    def __init__(self, objective: Classification, folder: str | None) -> None:
        self.objective = objective
        self.folder = Path(folder).expanduser() / "logits" if folder else None
        self.network = network_key(objective)
        self.heads: dict[str, tuple[Tensor, Tensor]] = {}
        self.tables: dict[tuple[str, str], LogitTable] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the module `name` is frozen."""
        return name in self.heads

    def freeze(self, name: str, weight: Tensor, bias: Tensor) -> None:
        """Declares the adapter `name` and its readout W h + b frozen; logits cached under this name are dropped."""
        self.heads[name] = weight.detach(), bias.detach()
        self.tables = {key: table for key, table in self.tables.items() if key[0] != name}

    def get(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """[len(rows), rows of W] fp32 logits of a frozen module; only those that no run has stored are computed."""
        table = self._table(name, pool)
        missing = np.unique(rows[table.slot[rows] < 0])
        self.objective.meter.cached(table.count_new(rows) - len(missing))
        if len(missing):
            with self._active(name):
                for block in split_into_blocks(pool.lengths, missing):
                    table.add(block, self._compute(name, pool, block))
            table.save()
        values: np.ndarray = table.values[table.slot[rows]]
        return values

    def prefetch(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Computes the missing rows ahead of `get`, divided among the ranks; every rank gets all results."""
        if get_world().size == 1:
            self.get(name, pool, rows)
            return
        table = self._table(name, pool)
        missing = np.unique(np.concatenate(get_world().gather(rows[table.slot[rows] < 0])))
        todo = list(split_into_blocks(pool.lengths, missing))
        cached = table.count_new(rows) - len(missing)
        self.objective.meter.cached(max(0, cached) if get_world().is_main else 0)
        with self._active(name):
            computed = get_world().map(lambda block: self._compute(name, pool, block), todo)
        for block, logits in zip(todo, computed, strict=True):
            new = table.slot[block] < 0  # this rank may have rows that another one was missing
            table.add(block[new], logits[new])
        if todo:
            table.save()

    def _active(self, name: str) -> contextlib.AbstractContextManager[None]:
        adapters = self.objective.adapters
        return adapters.off() if name == BARE else adapters.using(name)

    @torch.no_grad()
    def _compute(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """Logits of one block; rows are repeated until it has its fixed shape, and repetitions are cut off again."""
        width = block_widths(pool.lengths)[rows[0]]
        features = self.objective.features(pool.batch(np.resize(rows, BLOCK_ROWS), self.objective.device, width))
        return F.linear(features, *self.heads[name])[: len(rows)].cpu().numpy()

    def _table(self, name: str, pool: EncodedDataset) -> "LogitTable":
        key = name, pool.fingerprint
        if key not in self.tables:
            weight, bias = self.heads[name]
            tensors = {**self.objective.adapters.tensors(name), "readout weight": weight, "readout bias": bias}
            file = hashlib.sha256(f"{self.network} {pool.fingerprint} {tensors_key(tensors)}".encode()).hexdigest()[:32]
            path = self.folder / f"{file}.safetensors" if self.folder and pool.cached_on_disk else None
            self.tables[key] = LogitTable(len(pool), len(weight), path)
        return self.tables[key]


class LogitTable:
    """Logits of a pool's rows, in memory and, if there is a path, in a file that several processes may write."""

    def __init__(self, rows: int, width: int, path: Path | None) -> None:
        self.path = path
        self.slot = np.full(rows, -1, dtype=np.int64)  # pool row -> row of `values`, -1 if not cached
        self.values = np.empty((0, width), dtype=np.float32)
        self.requested = np.zeros(rows, dtype=bool)
        self.merge()

    def add(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """Adds rows that are not in the table yet."""
        self.slot[rows] = np.arange(len(self.values), len(self.values) + len(rows))
        self.values = np.concatenate([self.values, logits])

    def count_new(self, rows: np.ndarray) -> int:
        """Number of distinct rows requested for the first time; marks them as requested."""
        new = np.unique(rows[~self.requested[rows]])
        self.requested[new] = True
        return len(new)

    def merge(self) -> None:
        """Adds the rows of the file; a missing or damaged file counts as empty."""
        stored = atomic_io.load_arrays(self.path) if self.path else {}
        if stored:
            new = self.slot[stored["rows"]] < 0
            self.add(stored["rows"][new], stored["logits"][new])

    def save(self) -> None:
        """Replaces the file by the union of its rows and those in memory; stops using a path that cannot be written."""
        if self.path is None or not get_world().is_main:
            return
        self.merge()
        rows = np.flatnonzero(self.slot >= 0)
        if not atomic_io.save_arrays(self.path, {"rows": rows, "logits": self.values[self.slot[rows]]}):
            self.path = None


def network_key(objective: Classification) -> str:
    """Digest of everything that the logits of all modules depend on.

    These are the backbone's weights and shape, attention, precision, device and the position that is read. Weights
    from files or the hub are identified by their hash or commit; weights that exist in memory only are hashed.
    """
    adapters, device = objective.adapters, objective.device
    adapter_ids = {id(value) for name in adapters.names for value in adapters.tensors(name).values()}
    named = {name: value for name, value in adapters.model.named_parameters() if id(value) not in adapter_ids}
    weights = objective.backbone.fingerprint(objective.cache_dir)
    peft = adapters.config.to_dict() if adapters.config else {}
    config = config_of(adapters.model)
    identity = [
        weights or tensors_key({name: full_tensor(value) for name, value in named.items()}),
        {name: [list(value.shape), str(value.dtype)] for name, value in named.items()},
        [config.to_dict(), config._attn_implementation],
        {key: sorted(value) if isinstance(value, set) else value for key, value in peft.items()},
        [str(objective.dtype), objective.representation.value, BLOCK_ROWS, WIDTH_MULTIPLE],
        rounding_platform(device),
    ]
    return digest(identity, 64)


def tensors_key(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, shapes, dtypes and bits."""
    checksum = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        checksum.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        checksum.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()
