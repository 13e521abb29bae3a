"""Plain text to windows of tokens: tokenised once into files that are mapped, packed end to end, cut into windows.

The documents of a domain make one row of tokens. Training cuts it into blocks of equal length, one remainder per
domain dropped; tests cut it into windows that predict every token but their first.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clpet.config import derive, digest
from clpet.errors import DataError, HostError
from clpet.tasks import Example
from clpet.text import Batch, EncodedDataset, Ragged, frame

AT_ONCE = 256  # documents tokenised together
FILES = {"tokens": None, "starts": np.dtype(np.int64), "sizes": np.dtype(np.float32)}


@dataclass(frozen=True)
class Stream:
    """A domain's split as one row of tokens: ids [T], where documents start, bytes of text that each token stands for.

    `starts` is empty where the borders of documents are not known. Special tokens stand for no bytes.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class Tokens:
    """Token streams, made once and kept under `folder` by tokenizer and text; without a folder they stay in memory."""

    def __init__(self, tokenizer: Any, folder: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.folder = Path(folder) / "tokens" if folder else None
        self.head, tail = frame(tokenizer)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.tail = tail or ([] if end is None else [end])
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        core = getattr(tokenizer, "backend_tokenizer", None)
        known = core.to_str() if core is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.identity = digest([known, self.head, self.tail], 32)

    def stream(self, documents: Sequence[Example], sized: bool) -> Stream:
        """The documents, each between the tokenizer's own first token and its end token, one after the other.

        Bytes are counted only where `sized`.
        """
        if self.folder is None:
            return _joined(list(self._encode(documents, sized)), self.dtype)
        place = self.folder / digest([self.identity, text_hash(documents), sized], 32)
        found = _read(place, self.dtype)
        if found is None:
            self._write(place, documents, sized)
            found = _read(place, self.dtype)
            assert found is not None
        return found

    def _encode(self, documents: Iterable[Example], sized: bool) -> Iterator[tuple[list[int], list[float], bool]]:
        """(ids, bytes of each, whether a document begins here) of every document."""
        known = getattr(documents, "borders", True)
        head, tail = (self.head, self.tail) if known else ([], [])
        offsets = sized and self.tokenizer.is_fast
        waiting = iter(documents)
        while group := list(islice(waiting, AT_ONCE)):
            texts = [example.text for example in group]
            found = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=offsets, return_attention_mask=False,
                verbose=False,
            )  # fmt: skip
            for place, (text, ids) in enumerate(zip(texts, found["input_ids"], strict=True)):
                sizes = byte_sizes(text, found["offset_mapping"][place]) if offsets else _even(text, len(ids))
                sizes = [0.0] * len(head) + sizes + [0.0] * len(tail) if sized else []
                yield [*head, *ids, *tail], sizes, known

    def _write(self, place: Path, documents: Sequence[Example], sized: bool) -> None:
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            count, starts = 0, []
            with (temporary / "tokens").open("wb") as tokens, (temporary / "sizes").open("wb") as sizes:
                for ids, size, begins in self._encode(documents, sized):
                    if begins:
                        starts.append(count)
                    count += len(ids)
                    tokens.write(np.array(ids, self.dtype).tobytes())
                    sizes.write(np.array(size, np.float32).tobytes())
            (temporary / "starts").write_bytes(np.array(starts, np.int64).tobytes())
            sums = {name: _sha256(temporary / name) for name in FILES}
            (temporary / "meta.json").write_text(json.dumps(sums))
            shutil.rmtree(place, ignore_errors=True)  # a damaged one; another process may just have made it anew
            if not place.exists():
                temporary.rename(place)
        except OSError as error:
            raise HostError(f"the token cache {place} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _read(place: Path, dtype: np.dtype) -> Stream | None:
    """A stream from disk, mapped; None where it is not there or damaged."""
    try:
        sums = json.loads((place / "meta.json").read_text())
        if any(_sha256(place / name) != sums.get(name) for name in FILES):
            return None
        return Stream(**{name: _map(place / name, kind or dtype) for name, kind in FILES.items()})
    except (OSError, ValueError, AttributeError):
        return None


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joined(parts: list[tuple[list[int], list[float], bool]], dtype: np.dtype) -> Stream:
    lengths = np.array([len(ids) for ids, _, _ in parts], np.int64)
    begins = np.array([begin for _, _, begin in parts], bool)
    starts = (np.cumsum(lengths) - lengths)[begins] if parts else np.empty(0, np.int64)
    ids = np.array([token for ids, _, _ in parts for token in ids], dtype)
    return Stream(ids, starts, np.array([size for _, sizes, _ in parts for size in sizes], np.float32))


def text_hash(documents: Sequence[Example]) -> str:
    """Identity of a split's text; what knows its own fingerprint is asked for it."""
    known = getattr(documents, "fingerprint", None)
    if known is not None:
        return str(known())
    found = hashlib.sha256()
    for example in documents:
        found.update(example.text.encode(errors="surrogatepass") + b"\x1e")
    return found.hexdigest()


def byte_sizes(text: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """UTF-8 bytes that each token adds to the text read so far: a character split over tokens counts once."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    width = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64)) if offsets else np.empty(0, np.int64)
    return np.diff(before[ends], prepend=0).astype(float).tolist()


def _even(text: str, count: int) -> list[float]:
    """Without offsets every token stands for the same share of its document's bytes."""
    return [len(text.encode(errors="replace")) / max(1, count)] * count


def blocks(total: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, tokens that are not predicted) of the whole blocks of `context` tokens."""
    starts = np.arange(total // context) * context
    return starts, np.full(len(starts), context), np.ones(len(starts), np.int64)


def windows(total: int, context: int, stride: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, tokens that are not predicted) of windows that predict every token once, but the very first ones.

    Without a stride windows do not overlap and each predicts all but its first token; with one, every token is
    predicted in the window that gives it the longest context. A tail that predicts nothing is left out.
    """
    step = stride or context
    count = max(1, -(-(total - context) // step) + 1) if total else 0
    starts = np.arange(count) * step
    lengths = np.minimum(context, total - starts)
    skips = np.ones(count, np.int64)
    skips[1:] = max(1, context - step)
    kept = lengths > skips
    return starts[kept], lengths[kept], skips[kept]


class Slices(Ragged):
    """Rows that are stretches of mapped streams, each behind `lead` tokens of its own."""

    def __init__(self, streams: list[Stream], which: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.streams, self.which, self.starts, self.lengths = streams, which, starts, lengths

    def __getitem__(self, row: int) -> np.ndarray:
        start = self.starts[row]
        return self.streams[self.which[row]].tokens[start : start + self.lengths[row]]


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

    With `isolate` a document neither sees nor predicts what stands before it in its window. With a `masking` places
    in the window are filled instead.
    """

    def __init__(self, pad_id: int, isolate: bool = False, masking: Masking | None = None) -> None:
        super().__init__([], [], [], pad_id)
        self.isolate, self.masking = isolate, masking
        self.streams: list[Stream] = []
        empty = np.empty(0, np.int64)
        self.source = Slices(self.streams, empty, empty, empty)
        self.skips, self.weights = empty, np.empty(0)

    def add(self, task: int, stream: Stream, cut: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """The windows `cut` of a stream, as rows of task `task`."""
        starts, lengths, skips = cut
        old, count = self.source, len(starts)
        assert isinstance(old, Slices)
        which = np.concatenate([old.which, np.full(count, len(self.streams))])
        self.streams.append(stream)
        self.source = Slices(
            self.streams, which, np.concatenate([old.starts, starts]), np.concatenate([old.lengths, lengths])
        )
        self.skips = np.concatenate([self.skips, skips])
        self.tasks = np.concatenate([self.tasks, np.full(count, task)])
        self.labels, self.lengths = np.full(len(self.tasks), -1), self.source.lengths
        self.weights = np.concatenate([self.weights, self._terms(len(self.tasks) - count, lengths - skips)])

    def _terms(self, first: int, plain: np.ndarray) -> np.ndarray:
        """Tokens predicted in the rows from `first` on; `plain` are those of whole windows."""
        rows = range(first, first + len(plain))
        if self.masking:
            return np.array([self.masking.count(self.source[row]) for row in rows], float)
        return np.array([self.predicted(row).sum() for row in rows], float) if self.isolate else plain.astype(float)

    def predicted(self, row: int) -> np.ndarray:
        """[length]: which tokens of a window are predicted."""
        places = np.arange(self.lengths[row]) >= self.skips[row]
        if self.isolate:
            places[self.borders(row)] = False
        return places

    def borders(self, row: int) -> np.ndarray:
        """Places of a window where a document begins."""
        source = self.source
        assert isinstance(source, Slices)
        known, start = self.streams[source.which[row]].starts, source.starts[row]
        first, last = np.searchsorted(known, [start, start + self.lengths[row]])
        return np.asarray(known[first:last]) - start

    def bytes(self, row: int) -> float:
        """UTF-8 bytes of the text that a window predicts."""
        source = self.source
        assert isinstance(source, Slices)
        start = source.starts[row]
        sizes = self.streams[source.which[row]].sizes[start : start + self.lengths[row]]
        return float(sizes[self.predicted(row)].sum(dtype=np.float64))

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> Batch:
        rows = np.asarray(rows, dtype=np.int64)
        batch = super().batch(rows, "cpu", width)
        length = batch.input_ids.shape[1]
        found = [self._read(row) for row in rows]
        places = np.concatenate([place * length + inside for place, (_, inside) in enumerate(found)])
        batch.places = torch.from_numpy(places)
        batch.wanted = batch.input_ids.view(-1)[batch.places]
        for place, (ids, _) in enumerate(found if self.masking else []):
            batch.input_ids[place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        if self.isolate:
            batch.documents = torch.from_numpy(np.stack([self._numbers(row, length) for row in rows]))
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
        begins[self.borders(row)] = 1
        begins[self.lengths[row]] = 1  # padding is a document of its own
        return begins[:-1].cumsum()


def pack(
    task: int, name: str, pool: Windows, stream: Stream, context: int, limit: int | None = None,
    stride: int | None = None, train: bool = True,
) -> None:  # fmt: skip
    """Adds a domain's windows to a pool. Raises DataError where there is not even one."""
    total = len(stream.tokens) if limit is None else min(limit, len(stream.tokens))
    cut = blocks(total, context) if train else windows(total, context, stride)
    if len(cut[0]) == 0:
        what = f"its train text has {total} tokens, not one window of {context}" if train else "its test text is empty"
        raise DataError(f"domain {name}: {what}; lower benchmark.max_length or leave the domain out")
    pool.add(task, stream, cut)
