"""Tokenised splits: one pool over all tasks, and batches of examples of similar length."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from clpet.data.benchmark import SPLITS, Benchmark, Example
from clpet.models.protocols import Tokenizer

IGNORED = -100  # target id of a position without a loss (PyTorch's default ignore_index)


@dataclass(frozen=True)
class Batch:
    """Padded token ids [batch, length] with their labels and tasks [batch]; `rows` are row numbers of the pool `pool`.

    `positions` [batch] are those of the mask token. `share` is the weight of the batch's mean loss in the loss of an
    optimizer step of several batches.
    """

    rows: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    labels: Tensor
    tasks: Tensor
    padded: bool = True
    left: bool = False  # padded on the left, for texts that a decoder continues
    share: float = 1.0
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
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return self._with({name: to_device(value, device) for name, value in tensors.items()})

    def select(self, indices: Tensor) -> Self:
        """The examples with the given indices in the batch, padding trimmed to the longest of them."""
        width = int(self.attention_mask[indices].sum(1).max())
        columns = slice(-width, None) if self.left else slice(width)
        return self._with({"rows": self.rows[indices.tolist()], "padded": True, **self._selected(indices, columns)})

    def _with(self, changes: Mapping[str, object]) -> Self:
        return type(self)(**{**vars(self), **changes})

    def _selected(self, indices: Tensor, columns: slice) -> dict[str, Tensor]:
        """The tensors of some examples, by field; `columns` are the token positions that remain."""
        cut = {name: getattr(self, name)[indices][:, columns] for name in ("input_ids", "attention_mask")}
        return cut | {name: getattr(self, name)[indices] for name in ("positions", "labels", "tasks")}


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(Batch):
    """Texts with the answers to write: `targets` [batch, answer length] are their tokens, IGNORED at padding."""

    targets: Tensor

    @property
    def tokens(self) -> int:
        return self.input_ids.numel() + self.targets.numel()

    def target_indices(self) -> Tensor:
        """[answer tokens]: their indices in the flattened `targets`; reading them off a GPU would wait for it."""
        assert self.pool is not None
        assert self.pool.answer is not None
        inside = np.arange(self.targets.shape[1]) < self.pool.answer.lengths[self.rows][:, None]
        return torch.from_numpy(np.flatnonzero(inside)).to(self.targets.device, non_blocking=True)

    def _selected(self, indices: Tensor, columns: slice) -> dict[str, Tensor]:
        return super()._selected(indices, columns) | {"targets": self.targets[indices]}


@dataclass(frozen=True, kw_only=True)
class ChatBatch(AnswerBatch):
    """Conversations whose earlier answers are predicted as well.

    `prompt_targets` [batch, length] are the tokens of these answers at their positions, IGNORED everywhere else.
    """

    prompt_targets: Tensor

    def next_tokens(self) -> Tensor:
        """[batch, prompt and answer - 1]: the token to predict at every position, or IGNORED."""
        return torch.cat([self.prompt_targets, self.targets], 1)[:, 1:]

    def _selected(self, indices: Tensor, columns: slice) -> dict[str, Tensor]:
        return super()._selected(indices, columns) | {"prompt_targets": self.prompt_targets[indices][:, columns]}


@dataclass(frozen=True, kw_only=True)
class WindowBatch(Batch):
    """Windows of plain text: `target_ids` [terms] are the tokens to predict.

    `target_positions` [terms] are their positions in the flattened input, in the order of the windows; `document_ids`
    [batch, length] number the documents of a window that do not attend to each other.
    """

    target_positions: Tensor
    target_ids: Tensor
    document_ids: Tensor | None = None

    def _selected(self, indices: Tensor, columns: slice) -> dict[str, Tensor]:
        values = super()._selected(indices, columns)
        length, width = self.input_ids.shape[1], values["input_ids"].shape[1]
        windows, positions = self.target_positions // length, self.target_positions % length
        terms = [torch.nonzero(windows == index).flatten() for index in indices.tolist()]
        values["target_positions"] = torch.cat([row * width + positions[term] for row, term in enumerate(terms)])
        values["target_ids"] = self.target_ids[torch.cat(terms)]
        if self.document_ids is not None:
            values["document_ids"] = self.document_ids[indices][:, columns]
        return values


def pad_id(tokenizer: Tokenizer) -> int:
    """Token id at padded positions: the padding token's, or 0 for a tokenizer without one (they are masked)."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A GPU copies it from pinned memory, while the CPU prepares the next batch."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
    `full_lengths` and `full_answer_lengths` [rows] are the numbers of tokens before truncation. `trained` has, for each
    token of a row, 1 if it is predicted as the answer is, else 0; None if none is.
    """

    cached_on_disk: bool = True  # whether outputs of frozen modules for its rows may be written to the cache folder
    texts: list[str] | None = None  # of the rows, where they are not those of a split of the benchmark

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
        trained: list[list[int]] | None = None,
    ) -> None:
        self.source = Ragged(tokens)
        self.trained = None if trained is None else Ragged(trained)
        self.answer = None if answers is None else Ragged(answers)
        self.full_lengths = self.source.lengths if full_lengths is None else np.array(full_lengths, np.int64)
        self.full_answer_lengths = np.array(full_answer_lengths or np.zeros(len(tokens)), np.int64)
        self.references, self.sources, self.left = references, sources, left
        self.lengths = self.source.lengths + (0 if self.answer is None else self.answer.lengths)
        self.weights = np.ones(len(tokens)) if self.answer is None else self.answer.lengths.astype(float)
        if trained is not None:
            self.weights += [sum(flags) for flags in trained]
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
        """SHA-256 of all token ids of the split, as far as they are a model's input, and of those it predicts."""
        hasher = hashlib.sha256(f"{self.pad_id} {self.mask_id}".encode())
        for ragged in (self.source, self.answer, self.trained):
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
        if self.trained is not None:
            flags, _ = self.trained.padded(rows, 0, self.left, width)
            arrays.append(np.where(flags == 1, ids, IGNORED))
        input_ids, mask, positions, labels, tasks, *answers = (
            to_device(torch.from_numpy(array), device) for array in arrays
        )
        fields = (rows, input_ids, mask, positions, labels, tasks, not inside.all(), self.left)
        if self.trained is not None:
            return ChatBatch(*fields, pool=self, targets=answers[0], prompt_targets=answers[1])
        return AnswerBatch(*fields, pool=self, targets=answers[0]) if answers else Batch(*fields, pool=self)

    def padded_tokens(self, rows: np.ndarray) -> int:
        """Number of token positions of a batch of these rows, padding included."""
        answer = 0 if self.answer is None else int(self.answer.lengths[rows].max())
        return len(rows) * (int(self.source.lengths[rows].max()) + answer)

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
    return Encoded(pools["train"], pools["validation"], pools["test"], benchmark.seed_key)
