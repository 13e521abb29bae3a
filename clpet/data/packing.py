"""Cuts streams of tokens into windows for language modelling.

Train streams are cut into blocks of equal length, packed end to end, and the remainder of each domain is dropped. Test
streams are cut into windows that together predict every token once, except the first of each window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clpet.config.seeding import derive
from clpet.data.batches import EncodedDataset, Ragged, WindowBatch
from clpet.data.token_cache import LazyTokens, Stream
from clpet.errors import DataError

BUFFER = 4096  # windows of a lazy stream that are shuffled among each other

Spans = tuple[np.ndarray, np.ndarray, np.ndarray]  # start, length, number of leading tokens without a prediction


def train_blocks(total: int, context: int) -> Spans:
    """The complete blocks of `context` tokens in a stream of `total` tokens."""
    starts = np.arange(total // context) * context
    return starts, np.full(len(starts), context), np.ones(len(starts), np.int64)


def eval_windows(total: int, context: int, stride: int | None = None, lead: int = 0) -> Spans:
    """Windows of at most `context` tokens over a stream of `total` tokens; no token is predicted twice.

    Without a stride the windows do not overlap and each predicts all but its first token. With a stride they overlap,
    and every token is predicted in the window that provides its longest context. With `lead` = 1 the first token of a
    window is not part of the text, so all of the text is predicted. A last window without predictions is left out.
    """
    room = context - lead
    step = min(stride or room, room)
    count = max(1, -(-(total - room) // step) + 1) if total else 0
    starts = np.arange(count) * step
    lengths = np.minimum(room, total - starts) + lead
    skips = np.ones(count, np.int64)
    skips[1:] = max(1, context - step)
    predicting = lengths > skips
    return starts[predicting], lengths[predicting], skips[predicting]


class Slices(Ragged):
    """Rows that are stretches of streams, after the token `bos_id` if it is set; lengths include it."""

    def __init__(
        self, streams: list[Stream], which: np.ndarray, starts: np.ndarray, lengths: np.ndarray, bos_id: int | None
    ) -> None:
        self.streams, self.which, self.starts, self.lengths, self.bos_id = streams, which, starts, lengths, bos_id
        self.lead = int(bos_id is not None)

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = self.span(row)
        tokens = self.streams[self.which[row]].tokens[start:end]
        return tokens if self.bos_id is None else np.concatenate([np.array([self.bos_id], tokens.dtype), tokens])

    def span(self, row: int) -> tuple[int, int]:
        """Start and end of a row in its stream."""
        return self.starts[row], self.starts[row] + self.lengths[row] - self.lead


@dataclass(frozen=True)
class Masking:
    """Masked language modelling: a model predicts a share of a window's tokens, special tokens excepted.

    In training, new positions are drawn each time; 80 % of them are masked, 10 % get a random token and 10 % keep
    theirs (Devlin et al., 2019, section 3.1). In evaluation, the positions of a window are fixed and all masked.
    """

    mask_id: int
    special: np.ndarray
    vocabulary: int
    seed: int
    share: float = 0.15
    training: bool = False

    def count(self, ids: np.ndarray) -> int:
        """Number of tokens of a window to predict."""
        maskable = int((~np.isin(ids, self.special)).sum())
        return min(maskable, max(1, round(self.share * maskable)))

    def apply(self, ids: np.ndarray, *window: int) -> tuple[np.ndarray, np.ndarray]:
        """(masked ids, positions to predict) of a window, which `window` identifies."""
        # PyTorch's generator, which checkpoints restore, seeds the draw in training: a resumed run draws the same.
        names = ("now", int(torch.randint(2**31, ()))) if self.training else window
        rng = np.random.default_rng(derive(self.seed, "mask", *names))
        positions = np.sort(rng.choice(np.flatnonzero(~np.isin(ids, self.special)), self.count(ids), replace=False))
        ids = ids.copy()
        draws = rng.random(len(positions)) if self.training else np.zeros(len(positions))
        ids[positions[draws < 0.8]] = self.mask_id
        replaced = positions[draws >= 0.9]
        ids[replaced] = rng.integers(self.vocabulary, size=len(replaced))
        return ids, positions


class Windows(EncodedDataset):
    """Windows over the streams of several domains; `weights` [rows] are the numbers of tokens that each predicts.

    With `document_mask` a document neither attends to nor is predicted from the documents before it in its window. With
    `masking` the model fills masked positions of the window instead of predicting every next token. With `bos_id` every
    window starts with that token, which is not predicted.
    """

    def __init__(
        self, pad_id: int, document_mask: bool = False, masking: Masking | None = None, bos_id: int | None = None
    ) -> None:
        super().__init__([], [], [], pad_id)
        self.document_mask, self.masking, self.bos_id = document_mask, masking, bos_id
        self.streams: list[Stream] = []
        empty = np.empty(0, np.int64)
        self.source = Slices(self.streams, empty, empty, empty, bos_id)
        self.skips, self.weights = empty, np.empty(0)

    def add(self, task: int, stream: Stream, spans: Spans) -> None:
        """Adds the windows `spans` of a stream as rows of task `task`."""
        starts, lengths, skips = spans
        old, count = self.source, len(starts)
        assert isinstance(old, Slices)
        which = np.concatenate([old.which, np.full(count, len(self.streams))])
        self.streams.append(stream)
        starts, lengths = np.concatenate([old.starts, starts]), np.concatenate([old.lengths, lengths])
        self.source = Slices(self.streams, which, starts, lengths, self.bos_id)
        self.skips = np.concatenate([self.skips, skips])
        self.tasks = np.concatenate([self.tasks, np.full(count, task)])
        self.labels, self.lengths = np.full(len(self.tasks), -1), self.source.lengths
        self.weights = np.concatenate([self.weights, self._terms(len(self.tasks) - count, spans[1] - skips)])

    def _terms(self, first: int, plain: np.ndarray) -> np.ndarray:
        """Numbers of predicted tokens of the rows from `first` on; `plain` are those without masks of any kind."""
        rows = range(first, first + len(plain))
        if self.masking:
            return np.array([self.masking.count(self.source[row]) for row in rows], float)
        return (
            np.array([self.predicted(row).sum() for row in rows], float) if self.document_mask else plain.astype(float)
        )

    def predicted(self, row: int) -> np.ndarray:
        """[length] bool: the tokens of a window that are predicted."""
        predicted: np.ndarray = np.arange(self.lengths[row]) >= self.skips[row]
        if self.document_mask:
            predicted[self.document_starts(row)] = False
        return predicted

    def document_starts(self, row: int) -> np.ndarray:
        """Positions in a window where a document begins."""
        source = self.source
        assert isinstance(source, Slices)
        starts, (start, end) = self.streams[source.which[row]].starts, source.span(row)
        first, last = np.searchsorted(starts, [start, end])
        return np.asarray(starts[first:last]) - start + source.lead

    def bytes(self, row: int) -> float:
        """UTF-8 bytes of the text that is predicted in a window."""
        source = self.source
        assert isinstance(source, Slices)
        start, end = source.span(row)
        sizes = self.streams[source.which[row]].sizes[start:end]
        return float(sizes[self.predicted(row)[source.lead :]].sum(dtype=np.float64))

    def shuffled(self, rows: np.ndarray, size: int, rng: np.random.Generator, chunk: int = 4) -> list[np.ndarray]:
        """One epoch in random order; domains that are tokenised during training are only shuffled inside buffers.

        Windows in one buffer are near each other in the files, so few texts are read at a time. Several domains are
        still mixed evenly over the epoch.
        """
        if not any(isinstance(stream.tokens, LazyTokens) for stream in self.streams):
            return super().shuffled(rows, size, rng, chunk)
        turns, order = rng.permutation(self.tasks[rows]), np.empty_like(rows)
        for task in np.unique(turns):
            task_rows = rows[self.tasks[rows] == task]
            buffers = [task_rows[start : start + BUFFER] for start in range(0, len(task_rows), BUFFER)]
            order[turns == task] = np.concatenate([rng.permutation(buffer) for buffer in buffers])
        return [order[start : start + size] for start in range(0, len(order), size)]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> WindowBatch:
        rows = np.asarray(rows, dtype=np.int64)
        batch = super().batch(rows, "cpu", width)
        length = batch.input_ids.shape[1]
        inputs = [self._read(row) for row in rows]
        positions = np.concatenate([index * length + inside for index, (_, inside) in enumerate(inputs)])
        target_positions = torch.from_numpy(positions)
        target_ids = batch.input_ids.view(-1)[target_positions]  # read before the masks are put in
        for index, (ids, _) in enumerate(inputs if self.masking else []):
            batch.input_ids[index, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        document_ids = None
        if self.document_mask:
            document_ids = torch.from_numpy(np.stack([self._document_ids(row, length) for row in rows]))
        windows = WindowBatch(
            **vars(batch), target_positions=target_positions, target_ids=target_ids, document_ids=document_ids
        )
        return windows.to(device)

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, positions of the tokens to predict) of one window."""
        if self.masking is None:
            return self.source[row], np.flatnonzero(self.predicted(row))
        source = self.source
        assert isinstance(source, Slices)
        return self.masking.apply(source[row], int(source.which[row]), int(source.starts[row]))

    def _document_ids(self, row: int, length: int) -> np.ndarray:
        """[length]: the number of documents of the window that have begun."""
        begins = np.zeros(length + 1, np.int64)
        begins[self.document_starts(row)] = 1
        begins[self.lengths[row]] = 1  # padding counts as a separate document
        return begins[:-1].cumsum()


def pack(
    task: int, name: str, pool: Windows, stream: Stream, context: int, limit: int | None = None,
    stride: int | None = None, split: str = "train",
) -> None:  # fmt: skip
    """Adds a domain's windows to a pool. Raises DataError for a text without a single window."""
    total = len(stream.tokens) if limit is None else min(limit, len(stream.tokens))
    train = split == "train"
    lead = int(pool.bos_id is not None)
    spans = train_blocks(total, context) if train else eval_windows(total, context, stride, lead)
    if len(spans[0]) == 0:
        lack = f"{total} tokens, fewer than one window of {context}" if train else "nothing to predict"
        fix = "lower benchmark.max_length or leave the domain out"
        raise DataError(f"domain {name}: its {split} text has {lack}; {fix}")
    pool.add(task, stream, spans)
