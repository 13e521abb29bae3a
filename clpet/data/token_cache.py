"""Plain text as a row of tokens: tokenised once into memory-mapped cache files, or each time it is read."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from clpet.config.identity import digest
from clpet.data.benchmark import Example, Fingerprinted
from clpet.data.template import first_tokens, special_tokens
from clpet.models.protocols import Tokenizer
from clpet.runtime import atomic_io

log = logging.getLogger(__name__)

BATCH = 256  # documents tokenised in one call
RECENT = 1024  # tokenised documents that a lazy stream holds in memory
FILES = {"tokens": None, "starts": np.dtype(np.int64), "sizes": np.dtype(np.float32)}


@dataclass(frozen=True)
class Stream:
    """A split of a domain as one row: token ids [T], starts of documents, UTF-8 bytes of each token [T] or empty.

    `starts` is empty for texts without document boundaries. Special tokens count 0 bytes.
    """

    tokens: "np.ndarray | LazyTokens"
    starts: np.ndarray
    sizes: np.ndarray


class TokenCache:
    """Token streams, made once and stored below `folder` by tokenizer and text.

    Without a folder, or if it cannot be written, they are held in memory.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | None = None, add_bos: bool = False) -> None:
        self.tokenizer = tokenizer
        self.folder = Path(folder).expanduser() / "tokens" if folder else None
        self.head, tail = first_tokens(tokenizer, add_bos), special_tokens(tokenizer)[1]
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.tail = tail or ([] if end is None else [end])
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        fast = getattr(tokenizer, "backend_tokenizer", None)
        definition = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.identity = digest([definition, self.head, self.tail], 32)

    def stream(self, documents: Sequence[Example], sized: bool) -> Stream:
        """The documents one after another, each between its first tokens and its end token.

        The bytes of each token are only computed if `sized`.
        """
        if self.folder is None:
            return self._in_memory(documents, sized)
        folder = self.folder / digest([self.identity, text_hash(documents), sized], 32)
        stream = _read(folder, self.dtype)
        if stream is None:
            try:
                self._write(folder, documents, sized)
            except OSError as error:
                reason = error.strerror or error
                log.warning("%s cannot be written, tokens are held in memory: %s", self.folder, reason)
                self.folder = None
                return self.stream(documents, sized)
            stream = _read(folder, self.dtype)
        return self._in_memory(documents, sized) if stream is None else stream

    def lazy_stream(self, documents: Sequence[Example]) -> Stream:
        """The same tokens, but each text is tokenised whenever it is read; only their lengths are stored."""
        path = self.folder and self.folder / f"{digest([self.identity, text_hash(documents)], 32)}.lengths"
        arrays = atomic_io.load_arrays(path) if path else {}
        if not arrays:
            counts = np.array([len(ids) for ids, _, _ in self._encode(documents, sized=False)], np.int64)
            arrays = {"lengths": counts}
            if path:
                atomic_io.save_arrays(path, arrays)
        ends = np.cumsum(arrays["lengths"])
        starts = ends - arrays["lengths"] if has_boundaries(documents) else np.empty(0, np.int64)
        return Stream(LazyTokens(self, documents, ends), starts, np.empty(0, np.float32))

    def encode(self, documents: Sequence[Example], index: int) -> np.ndarray:
        """Token ids of one document."""
        ids, _, _ = next(self._encode([documents[index]], False, has_boundaries(documents)))
        return np.array(ids, self.dtype)

    def _in_memory(self, documents: Sequence[Example], sized: bool) -> Stream:
        encoded = list(self._encode(documents, sized))
        lengths = np.array([len(ids) for ids, _, _ in encoded], np.int64)
        begins = np.array([begin for _, _, begin in encoded], bool)
        starts = (np.cumsum(lengths) - lengths)[begins] if encoded else np.empty(0, np.int64)
        ids = np.array([token for ids, _, _ in encoded for token in ids], self.dtype)
        return Stream(ids, starts, np.array([size for _, sizes, _ in encoded for size in sizes], np.float32))

    def _write(self, folder: Path, documents: Sequence[Example], sized: bool) -> None:
        """Writes the files of a stream atomically. Raises OSError."""
        with atomic_io.cache_folder(folder) as temporary:
            count, starts = 0, []
            with (temporary / "tokens").open("wb") as tokens, (temporary / "sizes").open("wb") as sizes:
                for ids, size, begins in self._encode(documents, sized):
                    if begins:
                        starts.append(count)
                    count += len(ids)
                    tokens.write(np.array(ids, self.dtype).tobytes())
                    sizes.write(np.array(size, np.float32).tobytes())
            (temporary / "starts").write_bytes(np.array(starts, np.int64).tobytes())

    def _encode(
        self, documents: Iterable[Example], sized: bool, boundaries: bool | None = None
    ) -> Iterator[tuple[list[int], list[float], bool]]:
        """(ids, bytes of each, whether a document begins here) of every document; `boundaries` default to theirs."""
        boundaries = has_boundaries(documents) if boundaries is None else boundaries
        head, tail = (self.head, self.tail) if boundaries else ([], [])
        offsets = sized and self.tokenizer.is_fast
        waiting = iter(documents)
        while group := list(islice(waiting, BATCH)):
            texts = [example.text for example in group]
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=offsets, return_attention_mask=False,
                verbose=False,
            )  # fmt: skip
            for index, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
                sizes = byte_sizes(text, encoded["offset_mapping"][index]) if offsets else _even(text, len(ids))
                sizes = [0.0] * len(head) + sizes + [0.0] * len(tail) if sized else []
                yield [*head, *ids, *tail], sizes, boundaries


class LazyTokens:
    """A row of tokens [T] whose stretches are tokenised when they are read; `ends` [documents] are stored."""

    def __init__(self, cache: TokenCache, documents: Sequence[Example], ends: np.ndarray) -> None:
        self.ends, self.dtype = ends, cache.dtype
        self.document = lru_cache(RECENT)(lambda index: cache.encode(documents, index))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, stretch: slice) -> np.ndarray:
        start, stop, _ = stretch.indices(len(self))
        first, last = np.searchsorted(self.ends, start, "right"), np.searchsorted(self.ends, stop, "left")
        documents = [self.document(int(index)) for index in range(first, last + 1)]
        offset = int(self.ends[first]) - len(documents[0])  # where the first of these documents starts
        return np.concatenate(documents)[start - offset : stop - offset]


def has_boundaries(documents: Iterable[Example]) -> bool:
    """Whether the elements are separate documents; those of a plain list always are."""
    separate: bool = getattr(documents, "has_boundaries", True)
    return separate


def _read(folder: Path, dtype: np.dtype) -> Stream | None:
    """A stream from memory-mapped files; None if they are missing or damaged."""
    if not atomic_io.is_intact(folder):
        return None
    return Stream(**{name: _map(folder / name, kind or dtype) for name, kind in FILES.items()})


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # memmap refuses empty files


def text_hash(documents: Sequence[Example]) -> str:
    """Identity of a split's text: its fingerprint, or a hash of all texts."""
    if isinstance(documents, Fingerprinted):
        return documents.fingerprint()
    hasher = hashlib.sha256()
    for example in documents:
        hasher.update(example.text.encode(errors="surrogatepass") + b"\x1e")
    return hasher.hexdigest()


def byte_sizes(text: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """UTF-8 bytes that each token adds to those before it: a character split over several tokens counts once."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    width = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64)) if offsets else np.empty(0, np.int64)
    sizes: list[float] = np.diff(before[ends], prepend=0).astype(float).tolist()
    return sizes


def _even(text: str, count: int) -> list[float]:
    """Without offsets (slow tokenizers), the bytes of a document are divided evenly among its tokens."""
    return [len(text.encode(errors="replace")) / max(1, count)] * count
