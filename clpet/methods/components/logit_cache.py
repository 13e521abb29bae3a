"""Logits of frozen modules: computed once per example, kept on disk, shared by resumed and repeated runs.

What a frozen module says about an example never changes, so it may be looked up instead of computed, provided
that a look-up gives the bits that computing would give. Therefore an example always goes through the network in a
block of the same shape (`blocks`): rounding depends on a block's shape, not on the neighbours in it. A run's
result then depends neither on what the cache held before nor on who filled it.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.identity import digest
from clpet.data.batches import EncodedDataset
from clpet.models.fixed_blocks import BLOCK, STEP, block_widths, blocks, platform
from clpet.objectives.classification import Classification
from clpet.runtime import atomic_io
from clpet.runtime.distributed import full_tensor, get_world

BARE = "bare backbone"  # the frozen module without an adapter


class LogitCache:
    """Logits by frozen module and split; `folder` = None keeps them in memory only."""

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
        """From now on the adapter `name` and its readout W h + b stay as they are; what was held under it goes."""
        self.heads[name] = weight.detach(), bias.detach()
        self.tables = {key: table for key, table in self.tables.items() if key[0] != name}

    def get(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """[len(rows), rows of W] fp32 logits of a frozen module; only what no run has computed is computed."""
        table = self._table(name, pool)
        missing = np.unique(rows[table.slot[rows] < 0])
        self.objective.meter.cached(table.count_new(rows) - len(missing))
        if len(missing):
            with self._through(name):
                for part in blocks(pool.lengths, missing):
                    table.add(part, self._compute(name, pool, part))
            table.save()
        return table.values[table.slot[rows]]

    def prefetch(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Has `get` find these rows, wherever a rank of several has to compute some: each does its part of them."""
        if get_world().size == 1:
            self.get(name, pool, rows)
            return
        table = self._table(name, pool)
        unknown = np.unique(np.concatenate(get_world().gather(rows[table.slot[rows] < 0])))
        parts = list(blocks(pool.lengths, unknown))
        asked = table.count_new(rows) - len(unknown)
        self.objective.meter.cached(max(0, asked) if get_world().is_main else 0)
        with self._through(name):
            found = get_world().map(lambda part: self._compute(name, pool, part), parts)
        for part, logits in zip(parts, found, strict=True):
            new = table.slot[part] < 0
            table.add(part[new], logits[new])
        if parts:
            table.save()

    def _through(self, name: str) -> contextlib.AbstractContextManager[None]:
        adapters = self.objective.adapters
        return adapters.off() if name == BARE else adapters.using(name)

    @torch.no_grad()
    def _compute(self, name: str, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """Logits of one block: places without an example repeat the others."""
        width = block_widths(pool.lengths)[rows[0]]
        features = self.objective.features(pool.batch(np.resize(rows, BLOCK), self.objective.device, width))
        return F.linear(features, *self.heads[name])[: len(rows)].cpu().numpy()

    def _table(self, name: str, pool: EncodedDataset) -> "LogitTable":
        key = name, pool.fingerprint
        if key not in self.tables:
            weight, bias = self.heads[name]
            tensors = {**self.objective.adapters.tensors(name), "readout weight": weight, "readout bias": bias}
            file = hashlib.sha256(f"{self.network} {pool.fingerprint} {tensors_key(tensors)}".encode()).hexdigest()[:32]
            path = self.folder / f"{file}.safetensors" if self.folder else None
            self.tables[key] = LogitTable(len(pool), len(weight), path)
        return self.tables[key]


class LogitTable:
    """Rows of a pool and their logits, in memory and, where there is a path, in a file that processes share."""

    def __init__(self, rows: int, width: int, path: Path | None) -> None:
        self.path = path
        self.slot = np.full(rows, -1, dtype=np.int64)  # of a pool's row in `values`; -1: not known
        self.values = np.empty((0, width), dtype=np.float32)
        self.asked = np.zeros(rows, dtype=bool)
        self.merge()

    def add(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """Takes in rows that are not known yet."""
        self.slot[rows] = np.arange(len(self.values), len(self.values) + len(rows))
        self.values = np.concatenate([self.values, logits])

    def count_new(self, rows: np.ndarray) -> int:
        """How many distinct rows are asked for the first time."""
        new = np.unique(rows[~self.asked[rows]])
        self.asked[new] = True
        return len(new)

    def merge(self) -> None:
        """Takes in what the file knows; a file that is not there or damaged knows nothing."""
        found = atomic_io.load_arrays(self.path) if self.path else {}
        if found:
            new = self.slot[found["rows"]] < 0
            self.add(found["rows"][new], found["logits"][new])

    def save(self) -> None:
        """Replaces the file by what it and memory know together; a disk that refuses is given up with a warning."""
        if self.path is None or not get_world().is_main:
            return
        self.merge()
        rows = np.flatnonzero(self.slot >= 0)
        if not atomic_io.save_arrays(self.path, {"rows": rows, "logits": self.values[self.slot[rows]]}):
            self.path = None


def network_key(objective: Classification) -> str:
    """What every module's logits depend on: the backbone's weights and shape, precision, device, place of reading.

    Weights from files or the hub are known by their hash or commit; those that are in memory alone are hashed.
    """
    adapters, device = objective.adapters, objective.device
    own = {id(value) for name in adapters.names for value in adapters.tensors(name).values()}
    named = {name: value for name, value in adapters.model.named_parameters() if id(value) not in own}
    weights = objective.backbone.fingerprint(objective.cache_dir)
    peft = adapters.config.to_dict() if adapters.config else {}
    config: Any = adapters.model.config
    known = [
        weights or tensors_key({name: full_tensor(value) for name, value in named.items()}),
        {name: [list(value.shape), str(value.dtype)] for name, value in named.items()},
        [config.to_dict(), config._attn_implementation],
        {key: sorted(value) if isinstance(value, set) else value for key, value in peft.items()},
        [str(objective.dtype), objective.representation.value, BLOCK, STEP],
        platform(device),
    ]
    return digest(known, 64)


def tensors_key(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(data)
    return found.hexdigest()
