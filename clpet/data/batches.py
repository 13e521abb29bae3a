"""Tokenised splits: one pool over all tasks, and batches of examples of similar length."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from clpet.data.benchmark import SPLITS, Benchmark, Example
from clpet.models.protocols import Tokenizer

IGNORED = -100  # target id of a position without a loss (PyTorch's default ignore_index)


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
    left: bool = False  # padded on the left, for texts that a decoder continues
    share: float = 1.0  # weight of its mean loss in the loss of an optimizer step of several batches
    targets: Tensor | None = None
    target_positions: Tensor | None = None
    target_ids: Tensor | None = None
    document_ids: Tensor | None = None
    pool: "EncodedDataset | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The correct answers of each example."""
        assert self.pool is not None
        assert self.pool.references is not None
        return [self.pool.references[row] for row in self.rows]

    @property
    def sources(self) -> list[str]:
        """The source text of each example, before template and tokenizer."""
        assert self.pool is not None
        assert self.pool.sources is not None
        return [self.pool.sources[row] for row in self.rows]

    @property
    def tokens(self) -> int:
        """Number of token positions that are computed, padding included."""
        return self.input_ids.numel() + (0 if self.targets is None else self.targets.numel())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(device, non_blocking=True))
        return self

    def select(self, indices: Tensor) -> "Batch":
        """The examples with the given indices in the batch, padding trimmed to the longest of them."""
        mask = self.attention_mask[indices]
        width = int(mask.sum(1).max())
        columns = slice(-width, None) if self.left else slice(width)
        return Batch(
            self.rows[indices.tolist()],
            self.input_ids[indices][:, columns],
            mask[:, columns],
            self.positions[indices],
            self.labels[indices],
            self.tasks[indices],
            left=self.left,
            targets=None if self.targets is None else self.targets[indices],
            pool=self.pool,
        )


def pad_id(tokenizer: Tokenizer) -> int:
    """Token id at padded positions: the padding token's, or 0 for a tokenizer without one (they are masked)."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def position_ids(mask: Tensor) -> Tensor:
    """[batch, length] position ids that count only the tokens that `mask` attends to, for padding on either side."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Ragged:
    """Rows of token ids of different lengths, stored as one flat array with offsets."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(self.starts[-1]))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def padded(
        self, rows: np.ndarray, fill: int, left: bool = False, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask: True where ids are not padding), both [rows, width or longest]."""
        lengths = self.lengths[rows][:, None]
        columns = np.arange(width or int(lengths.max()))
        inside = columns >= columns.size - lengths if left else columns < lengths
        ids = np.full(inside.shape, fill, dtype=np.int64)
        ids[inside] = np.concatenate([self[row] for row in rows])
        return ids, inside


class EncodedDataset:
    """One split of all tasks, tokenised: a label id and a task number per row, and an answer for text to text.

    Batches are sorted by `lengths` [rows]; `weights` [rows] are the numbers of terms of each row in a mean loss.
    `full_lengths` and `full_answer_lengths` [rows] are the numbers of tokens before truncation.
    """

    cached_on_disk: bool = True  # whether outputs of frozen modules for its rows may be written to the cache folder

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
        full_lengths: Sequence[int] | None = None,
        full_answer_lengths: Sequence[int] | None = None,
    ) -> None:
        self.source = Ragged(tokens)
        self.answer = None if answers is None else Ragged(answers)
        self.full_lengths = self.source.lengths if full_lengths is None else np.array(full_lengths, np.int64)
        self.full_answer_lengths = np.array(full_answer_lengths or np.zeros(len(tokens)), np.int64)
        self.references, self.sources, self.left = references, sources, left
        self.lengths = self.source.lengths + (0 if self.answer is None else self.answer.lengths)
        self.weights = np.ones(len(tokens)) if self.answer is None else self.answer.lengths.astype(float)
        self.labels = np.array(labels, dtype=np.int64)
        self.tasks = np.array(tasks, dtype=np.int64)
        self.pad_id, self.mask_id = pad_id, mask_id

    def __len__(self) -> int:
        return len(self.lengths)

    def num_truncated(self, rows: np.ndarray) -> tuple[int, int]:
        """Numbers of truncated texts and of truncated answers among the rows."""
        texts = self.full_lengths[rows] > self.source.lengths[rows]
        answers = self.full_answer_lengths[rows] > (0 if self.answer is None else self.answer.lengths[rows])
        return int(texts.sum()), int(answers.sum())

    def rows_of(self, *tasks: int) -> np.ndarray:
        """Row numbers of the given tasks, in order."""
        return np.flatnonzero(np.isin(self.tasks, tasks))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids of the split, as far as they are a model's input."""
        hasher = hashlib.sha256(f"{self.pad_id} {self.mask_id}".encode())
        for ragged in (self.source, self.answer):
            for array in (ragged.flat, ragged.starts) if ragged else ():
                hasher.update(array.tobytes())
        return hasher.hexdigest()

    def tokens(self, row: int) -> np.ndarray:
        """Token ids of one row, without its answer."""
        return self.source[row]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> Batch:
        """The rows as a batch, padded to the longest or to `width`."""
        rows = np.asarray(rows, dtype=np.int64)
        ids, inside = self.source.padded(rows, self.pad_id, self.left, width)
        mask_positions = np.argmax(ids == self.mask_id, axis=1)
        arrays = [ids, inside.astype(np.int64), mask_positions, self.labels[rows], self.tasks[rows]]
        if self.answer is not None:
            arrays.append(self.answer.padded(rows, IGNORED)[0])
        input_ids, mask, positions, labels, tasks, *answers = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        batch = Batch(rows, input_ids, mask, positions, labels, tasks, not inside.all(), self.left, pool=self)
        batch.targets = answers[0] if answers else None
        return batch

    def by_length(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The rows in batches of `size`, longest first, with little padding."""
        ordered = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def shuffled(self, rows: np.ndarray, size: int, rng: np.random.Generator, chunk: int = 4) -> list[np.ndarray]:
        """One epoch in random order: inside chunks of `chunk` batches, rows are sorted by length to reduce padding."""
        order = rng.permutation(rows)
        batches: list[np.ndarray] = []
        for start in range(0, len(order), size * chunk):
            batches += self.by_length(order[start : start + size * chunk], size)
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass
class Encoded:
    """The tokenised splits of a benchmark, each one pool over all tasks."""

    train: EncodedDataset
    validation: EncodedDataset
    test: EncodedDataset
    seed_key: Callable[[int], int | str] = int  # task number -> key of its random streams, see Benchmark.seed_key

    def split(self, name: str) -> EncodedDataset:
        """One of SPLITS."""
        pool: EncodedDataset = getattr(self, name)
        return pool


def encode_benchmark(
    benchmark: Benchmark, encode: Callable[[list[Example], list[int], list[int]], EncodedDataset]
) -> Encoded:
    """Encodes every split once. Arguments of `encode`: examples, their label ids (-1 without), their task numbers."""
    pools = {}
    for split in SPLITS:
        pairs = [(index, example) for index, task in enumerate(benchmark.tasks) for example in task.split(split)]
        labels = [benchmark.label_ids.get(str(example.target), -1) for _, example in pairs]
        pools[split] = encode([example for _, example in pairs], labels, [index for index, _ in pairs])
    return Encoded(pools["train"], pools["validation"], pools["test"])
