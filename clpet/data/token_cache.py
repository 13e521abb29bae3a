"""Plain text as rows of tokens: tokenised once into files that are mapped, or whenever it is read."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clpet.config.identity import digest
from clpet.data.benchmark import Example
from clpet.data.template import first_tokens, frame
from clpet.runtime import atomic_io

log = logging.getLogger(__name__)

AT_ONCE = 256  # documents tokenised together
RECENT = 1024  # documents of a lazy stream that are kept
FILES = {"tokens": None, "starts": np.dtype(np.int64), "sizes": np.dtype(np.float32)}


@dataclass(frozen=True)
class Stream:
    """A domain's split as one row of tokens: ids [T], where documents start, bytes of text that each token stands for.

    `starts` is empty where the borders of documents are not known. Special tokens stand for no bytes.
    """

    tokens: Any
    starts: np.ndarray
    sizes: np.ndarray


class Tokens:
    """Token streams, made once and kept under `folder` by tokenizer and text.

    Without a folder, or where it cannot be written, they stay in memory.
    """

    def __init__(self, tokenizer: Any, folder: str | None = None, begin: bool = False) -> None:
        self.tokenizer = tokenizer
        self.folder = Path(folder).expanduser() / "tokens" if folder else None
        self.head, tail = first_tokens(tokenizer, begin), frame(tokenizer)[1]
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.tail = tail or ([] if end is None else [end])
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        core = getattr(tokenizer, "backend_tokenizer", None)
        known = core.to_str() if core is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.identity = digest([known, self.head, self.tail], 32)

    def stream(self, documents: Sequence[Example], sized: bool) -> Stream:
        """The documents, each between its first and its end token, one after the other.

        Bytes are counted only where `sized`.
        """
        if self.folder is None:
            return _joined(list(self._encode(documents, sized)), self.dtype)
        place = self.folder / digest([self.identity, text_hash(documents), sized], 32)
        found = _read(place, self.dtype)
        if found is None:
            try:
                self._write(place, documents, sized)
            except OSError as error:
                reason = error.strerror or error
                log.warning("%s cannot be written, tokens stay in memory: %s", self.folder, reason)
                self.folder = None
                return self.stream(documents, sized)
            found = _read(place, self.dtype)
        return _joined(list(self._encode(documents, sized)), self.dtype) if found is None else found

    def _encode(self, documents: Iterable[Example], sized: bool) -> Iterator[tuple[list[int], list[float], bool]]:
        """(ids, bytes of each, whether a document begins here) of every document."""
        known = getattr(documents, "has_boundaries", True)
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
        """Makes the files of a stream, whole or not at all. Raises OSError."""
        with atomic_io.cache_folder(place) as folder:
            count, starts = 0, []
            with (folder / "tokens").open("wb") as tokens, (folder / "sizes").open("wb") as sizes:
                for ids, size, begins in self._encode(documents, sized):
                    if begins:
                        starts.append(count)
                    count += len(ids)
                    tokens.write(np.array(ids, self.dtype).tobytes())
                    sizes.write(np.array(size, np.float32).tobytes())
            (folder / "starts").write_bytes(np.array(starts, np.int64).tobytes())

    def lazy(self, documents: Sequence[Example]) -> Stream:
        """The same tokens for texts that are tokenised whenever they are read; only their lengths are kept on disk."""
        path = self.folder and self.folder / f"{digest([self.identity, text_hash(documents)], 32)}.lengths"
        found = atomic_io.load_arrays(path) if path else {}
        if not found:
            counts = np.array([len(ids) for ids, _, _ in self._encode(documents, sized=False)], np.int64)
            found = {"lengths": counts}
            if path:
                atomic_io.save_arrays(path, found)
        ends = np.cumsum(found["lengths"])
        starts = ends - found["lengths"] if getattr(documents, "has_boundaries", True) else np.empty(0, np.int64)
        return Stream(Lazy(self, documents, ends), starts, np.empty(0, np.float32))

    def encode(self, documents: Sequence[Example], place: int) -> np.ndarray:
        """Token ids of one document."""
        one = _One([documents[place]], getattr(documents, "has_boundaries", True))
        return np.array(next(self._encode(one, sized=False))[0], self.dtype)


class _One(list[Example]):
    """A single document, with what is known of its borders."""

    def __init__(self, examples: list[Example], has_boundaries: bool) -> None:
        super().__init__(examples)
        self.has_boundaries = has_boundaries


class Lazy:
    """A row of tokens [T] whose stretches are tokenised when they are asked for; `ends` [documents] are known."""

    def __init__(self, tokens: Tokens, documents: Sequence[Example], ends: np.ndarray) -> None:
        self.ends, self.dtype = ends, tokens.dtype
        self.document = lru_cache(RECENT)(lambda place: tokens.encode(documents, place))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        first, last = np.searchsorted(self.ends, start, "right"), np.searchsorted(self.ends, stop, "left")
        found = [self.document(int(place)) for place in range(first, last + 1)]
        before = int(self.ends[first]) - len(found[0])
        return np.concatenate(found)[start - before : stop - before]


def _read(place: Path, dtype: np.dtype) -> Stream | None:
    """A stream from disk, mapped; None where it is not there or damaged."""
    if not atomic_io.is_intact(place):
        return None
    return Stream(**{name: _map(place / name, kind or dtype) for name, kind in FILES.items()})


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


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
