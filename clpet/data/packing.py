"""Streams of tokens to windows of one length, packed end to end.

Training cuts a domain's stream into blocks of equal length, one remainder per domain dropped; tests cut it into
windows that predict every token but their first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset, Ragged
from clpet.data.token_cache import Lazy, Stream
from clpet.errors import DataError

BUFFER = 4096  # windows of a lazy stream that are shuffled among themselves


def blocks(total: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, tokens that are not predicted) of the whole blocks of `context` tokens."""
    starts = np.arange(total // context) * context
    return starts, np.full(len(starts), context), np.ones(len(starts), np.int64)


def windows(
    total: int, context: int, stride: int | None = None, lead: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, tokens that are not predicted) of windows that predict every token once, but the very first ones.

    Without a stride windows do not overlap and each predicts all but its first token; with one, every token is
    predicted in the window that gives it the longest context. With a `lead` of 1 a window begins with a token that is
    not of the text, and all of the text is predicted. A tail that predicts nothing is left out.
    """
    room = context - lead
    step = min(stride or room, room)
    count = max(1, -(-(total - room) // step) + 1) if total else 0
    starts = np.arange(count) * step
    lengths = np.minimum(room, total - starts) + lead
    skips = np.ones(count, np.int64)
    skips[1:] = max(1, context - step)
    kept = lengths > skips
    return starts[kept], lengths[kept], skips[kept]


class Slices(Ragged):
    """Rows that are stretches of streams, behind the token `bos_id` where there is one; lengths count it."""

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
        """Where in its stream a row begins and ends."""
        return self.starts[row], self.starts[row] + self.lengths[row] - self.lead


@dataclass(frozen=True)
class Masking:
    """What a masked model has to fill: a share of a window's tokens that are not special.

    In training the places are drawn anew every time, and of them a tenth keeps its token and a tenth gets another
    one (Devlin et al., 2019); in tests they are always the same and all masked.
    """

    mask_id: int
    special: np.ndarray
    vocabulary: int
    seed: int
    share: float = 0.15
    training: bool = False

    def count(self, ids: np.ndarray) -> int:
        """Tokens to fill of a window."""
        maskable = int((~np.isin(ids, self.special)).sum())
        return min(maskable, max(1, round(self.share * maskable)))

    def apply(self, ids: np.ndarray, *place: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids as the model reads them, places to fill) of the window at a place of its domain."""
        names = ("now", int(torch.randint(2**31, ()))) if self.training else place
        rng = np.random.default_rng(derive(self.seed, "mask", *names))
        places = np.sort(rng.choice(np.flatnonzero(~np.isin(ids, self.special)), self.count(ids), replace=False))
        ids = ids.copy()
        lots = rng.random(len(places)) if self.training else np.zeros(len(places))
        ids[places[lots < 0.8]] = self.mask_id
        others = places[lots >= 0.9]
        ids[others] = rng.integers(self.vocabulary, size=len(others))
        return ids, places


class Windows(EncodedDataset):
    """Windows over the streams of several domains; `weights` [rows] are the tokens that each predicts.

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

    def add(self, task: int, stream: Stream, cut: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """The windows `cut` of a stream, as rows of task `task`."""
        starts, lengths, skips = cut
        old, count = self.source, len(starts)
        assert isinstance(old, Slices)
        which = np.concatenate([old.which, np.full(count, len(self.streams))])
        self.streams.append(stream)
        starts, lengths = np.concatenate([old.starts, starts]), np.concatenate([old.lengths, lengths])
        self.source = Slices(self.streams, which, starts, lengths, self.bos_id)
        self.skips = np.concatenate([self.skips, skips])
        self.tasks = np.concatenate([self.tasks, np.full(count, task)])
        self.labels, self.lengths = np.full(len(self.tasks), -1), self.source.lengths
        self.weights = np.concatenate([self.weights, self._terms(len(self.tasks) - count, cut[1] - skips)])

    def _terms(self, first: int, plain: np.ndarray) -> np.ndarray:
        """Tokens predicted in the rows from `first` on; `plain` are those of whole windows."""
        rows = range(first, first + len(plain))
        if self.masking:
            return np.array([self.masking.count(self.source[row]) for row in rows], float)
        return (
            np.array([self.predicted(row).sum() for row in rows], float) if self.document_mask else plain.astype(float)
        )

    def predicted(self, row: int) -> np.ndarray:
        """[length]: which tokens of a window are predicted."""
        places = np.arange(self.lengths[row]) >= self.skips[row]
        if self.document_mask:
            places[self.document_starts(row)] = False
        return places

    def document_starts(self, row: int) -> np.ndarray:
        """Places of a window where a document begins."""
        source = self.source
        assert isinstance(source, Slices)
        known, (start, end) = self.streams[source.which[row]].starts, source.span(row)
        first, last = np.searchsorted(known, [start, end])
        return np.asarray(known[first:last]) - start + source.lead

    def bytes(self, row: int) -> float:
        """UTF-8 bytes of the text that a window predicts."""
        source = self.source
        assert isinstance(source, Slices)
        start, end = source.span(row)
        sizes = self.streams[source.which[row]].sizes[start:end]
        return float(sizes[self.predicted(row)[source.lead :]].sum(dtype=np.float64))

    def shuffled(self, rows: np.ndarray, size: int, rng: np.random.Generator, chunk: int = 4) -> list[np.ndarray]:
        """One epoch in random order; a domain that is read as it comes is shuffled inside a buffer.

        Several domains are mixed evenly all the same.
        """
        if not any(isinstance(stream.tokens, Lazy) for stream in self.streams):
            return super().shuffled(rows, size, rng, chunk)
        turns, order = rng.permutation(self.tasks[rows]), np.empty_like(rows)
        for task in np.unique(turns):
            own = rows[self.tasks[rows] == task]
            parts = [rng.permutation(own[start : start + BUFFER]) for start in range(0, len(own), BUFFER)]
            order[turns == task] = np.concatenate(parts)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> Batch:
        rows = np.asarray(rows, dtype=np.int64)
        batch = super().batch(rows, "cpu", width)
        length = batch.input_ids.shape[1]
        found = [self._read(row) for row in rows]
        places = np.concatenate([place * length + inside for place, (_, inside) in enumerate(found)])
        batch.target_positions = torch.from_numpy(places)
        batch.target_ids = batch.input_ids.view(-1)[batch.target_positions]
        for place, (ids, _) in enumerate(found if self.masking else []):
            batch.input_ids[place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        if self.document_mask:
            batch.document_ids = torch.from_numpy(np.stack([self._numbers(row, length) for row in rows]))
        return batch.to(device)

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids as the model reads them, places of the tokens to predict) of one window."""
        if self.masking is None:
            return self.source[row], np.flatnonzero(self.predicted(row))
        source = self.source
        assert isinstance(source, Slices)
        return self.masking.apply(source[row], int(source.which[row]), int(source.starts[row]))

    def _numbers(self, row: int, length: int) -> np.ndarray:
        """[length]: how many documents of the window have begun."""
        begins = np.zeros(length + 1, np.int64)
        begins[self.document_starts(row)] = 1
        begins[self.lengths[row]] = 1  # padding is a document of its own
        return begins[:-1].cumsum()


def pack(
    task: int, name: str, pool: Windows, stream: Stream, context: int, limit: int | None = None,
    stride: int | None = None, split: str = "train",
) -> None:  # fmt: skip
    """Adds a domain's windows to a pool. Raises DataError where there is not even one."""
    total = len(stream.tokens) if limit is None else min(limit, len(stream.tokens))
    train = split == "train"
    cut = blocks(total, context) if train else windows(total, context, stride, int(pool.bos_id is not None))
    if len(cut[0]) == 0:
        what = f"{total} tokens, not one window of {context}" if train else "nothing to predict"
        what = f"its {split} text has {what}"
        raise DataError(f"domain {name}: {what}; lower benchmark.max_length or leave the domain out")
    pool.add(task, stream, cut)
