"""Tokenised splits: pools over all tasks and length-bucketed batches."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clpet.data.benchmark import SPLITS, Benchmark, Example

IGNORED = -100  # target id of a place that is not learned


@dataclass
class Batch:
    """Padded token ids [batch, length] with labels or targets; `rows` are row numbers of the pool `pool`.

    Text to text: `targets` [batch, answer length] are the answer tokens, IGNORED at padding. Language modelling:
    `target_ids` [terms] are the tokens to predict and `target_positions` [terms] their positions in the flattened
    input; `document_ids` [batch, length] number the documents of a window that do not attend to each other.
    """

    rows: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    labels: Tensor
    tasks: Tensor
    padded: bool = True
    left: bool = False  # padded on the left, for texts that are continued
    share: float = 1.0  # of the optimiser step's mean, where a step is made of several batches
    targets: Tensor | None = None
    target_positions: Tensor | None = None
    target_ids: Tensor | None = None
    document_ids: Tensor | None = None
    pool: "EncodedDataset | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The answers that count as right, per example."""
        assert self.pool is not None
        assert self.pool.references is not None
        return [self.pool.references[row] for row in self.rows]

    @property
    def sources(self) -> list[str]:
        """The texts as they were read, per example."""
        assert self.pool is not None
        assert self.pool.sources is not None
        return [self.pool.sources[row] for row in self.rows]

    @property
    def tokens(self) -> int:
        """Token places computed on, padding included."""
        return self.input_ids.numel() + (0 if self.targets is None else self.targets.numel())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(device, non_blocking=True))
        return self

    def select(self, keep: Tensor) -> "Batch":
        """The examples at the given positions, re-padded to the longest of them."""
        mask = self.attention_mask[keep]
        width = int(mask.sum(1).max())
        inside = slice(-width, None) if self.left else slice(width)
        chosen = keep.tolist()
        return Batch(
            self.rows[chosen],
            self.input_ids[keep][:, inside],
            mask[:, inside],
            self.positions[keep],
            self.labels[keep],
            self.tasks[keep],
            left=self.left,
            targets=None if self.targets is None else self.targets[keep],
            pool=self.pool,
        )


def pad_id(tokenizer: Any) -> int:
    """Token id at places that are masked: the padding token's, or 0 for a tokenizer without one."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def positions(mask: Tensor) -> Tensor:
    """[batch, length]: the place of each token among its row's real ones."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Ragged:
    """Rows of token ids of any length, as one flat array with offsets."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(self.starts[-1]))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def padded(
        self, rows: np.ndarray, fill: int, left: bool = False, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [rows, width or longest], whether a place is inside its row)."""
        lengths = self.lengths[rows][:, None]
        places = np.arange(width or int(lengths.max()))
        inside = places >= places.size - lengths if left else places < lengths
        ids = np.full(inside.shape, fill, dtype=np.int64)
        ids[inside] = np.concatenate([self[row] for row in rows])
        return ids, inside


class EncodedDataset:
    """One split of all tasks, tokenised: a label id and a task number per row, and an answer where there is one.

    `lengths` [rows] is what batches are sorted by; `weights` [rows] how many terms of a mean loss a row has. `whole`
    and `whole_answer` [rows] are the tokens of text and answer before they were cut.
    """

    def __init__(
        self,
        tokens: list[list[int]],
        labels: Sequence[int],
        tasks: Sequence[int],
        pad_id: int,
        mask_id: int = -1,
        answers: list[list[int]] | None = None,
        references: list[tuple[str, ...]] | None = None,
        sources: list[str] | None = None,
        left: bool = False,
        whole: Sequence[int] | None = None,
        whole_answers: Sequence[int] | None = None,
    ) -> None:
        self.source = Ragged(tokens)
        self.answer = None if answers is None else Ragged(answers)
        self.whole = self.source.lengths if whole is None else np.array(whole, np.int64)
        self.whole_answer = np.array(whole_answers or np.zeros(len(tokens)), np.int64)
        self.references, self.sources, self.left = references, sources, left
        self.lengths = self.source.lengths + (0 if self.answer is None else self.answer.lengths)
        self.weights = np.ones(len(tokens)) if self.answer is None else self.answer.lengths.astype(float)
        self.labels = np.array(labels, dtype=np.int64)
        self.tasks = np.array(tasks, dtype=np.int64)
        self.pad_id, self.mask_id = pad_id, mask_id

    def __len__(self) -> int:
        return len(self.lengths)

    def cut(self, rows: np.ndarray) -> tuple[int, int]:
        """How many of the texts and of the answers of these rows were cut."""
        texts = self.whole[rows] > self.source.lengths[rows]
        answers = self.whole_answer[rows] > (0 if self.answer is None else self.answer.lengths[rows])
        return int(texts.sum()), int(answers.sum())

    def rows_of(self, *tasks: int) -> np.ndarray:
        """Row numbers of the given tasks, in order."""
        return np.flatnonzero(np.isin(self.tasks, tasks))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a network is given of this split."""
        found = hashlib.sha256(f"{self.pad_id} {self.mask_id}".encode())
        for part in (self.source, self.answer):
            for array in (part.flat, part.starts) if part else ():
                found.update(array.tobytes())
        return found.hexdigest()

    def tokens(self, row: int) -> np.ndarray:
        """Token ids of one row, without its answer."""
        return self.source[row]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> Batch:
        """The rows, padded to the longest, or to `width`."""
        rows = np.asarray(rows, dtype=np.int64)
        ids, inside = self.source.padded(rows, self.pad_id, self.left, width)
        positions = np.argmax(ids == self.mask_id, axis=1)
        arrays = [ids, inside.astype(np.int64), positions, self.labels[rows], self.tasks[rows]]
        if self.answer is not None:
            arrays.append(self.answer.padded(rows, IGNORED)[0])
        input_ids, mask, places, labels, tasks, *answers = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        batch = Batch(rows, input_ids, mask, places, labels, tasks, not inside.all(), self.left, pool=self)
        batch.targets = answers[0] if answers else None
        return batch

    def by_length(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The rows in batches of `size`, longest first, so that padding is next to nothing."""
        ordered = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def shuffled(self, rows: np.ndarray, size: int, rng: np.random.Generator, chunk: int = 4) -> list[np.ndarray]:
        """One epoch: the rows shuffled, batches formed inside chunks of a few batches sorted by length."""
        order = rng.permutation(rows)
        batches: list[np.ndarray] = []
        for start in range(0, len(order), size * chunk):
            batches += self.by_length(order[start : start + size * chunk], size)
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass
class Encoded:
    """A benchmark's splits, each one pool over all tasks."""

    train: EncodedDataset
    validation: EncodedDataset
    test: EncodedDataset
    seed_key: Callable[[int], int | str] = int  # of a task number: what its random draws are named by

    def split(self, name: str) -> EncodedDataset:
        """One of SPLITS."""
        return getattr(self, name)


def encode_benchmark(
    benchmark: Benchmark, encode: Callable[[list[Example], list[int], list[int]], EncodedDataset]
) -> Encoded:
    """Encodes every split once; `encode` gets examples, their label ids (-1 without) and their task numbers."""
    pools = {}
    for split in SPLITS:
        pairs = [(index, example) for index, task in enumerate(benchmark.tasks) for example in task.split(split)]
        labels = [benchmark.label_ids.get(str(example.target), -1) for _, example in pairs]
        pools[split] = encode([example for _, example in pairs], labels, [index for index, _ in pairs])
    return Encoded(pools["train"], pools["validation"], pools["test"])
