"""Documents: a lazy sequence of plain texts stored in files, so that a domain of gigabytes is never held in memory.

One pass over the files builds an index: position, size and hash of every document (56 bytes each). Everything else is
a selection of segments (document, first byte, end byte): splits, limits, documents with holes. Splits and limits select
by the hash of a document, so they depend neither on the order of the files nor on other domains. A text without
document boundaries is cut in order instead: a limit keeps its beginning, a split takes its end.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from clpet.data.benchmark import Example
from clpet.data.document_readers import Reader, Strings

# (document, first byte, end byte, pieces, remaining limit) of a segment -> its new end byte and number of pieces
Cut = Callable[[int, int, int, int, int], tuple[int, int]]
READER, POSITION, SPAN, SIZE, PIECES, KEY, HASH = range(7)  # columns of the index


class Corpus:
    """Readers and the index of their documents."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self._last_read: tuple[int, bytes] = (-1, b"")

    @cached_property
    def index(self) -> np.ndarray:
        """[documents, 7] uint64: the columns named above; documents without text are left out and counted."""
        rows = array("Q")
        for number, reader in enumerate(self.readers):
            for document in reader.scan():
                data = _encode(reader.joiner.join(document.pieces))
                reader.report.read[reader.name] += 1
                if not data.strip():
                    reader.report.drop("without text", 1)
                else:
                    content = _hash(data)
                    # A document with an id is selected by the hash of its id, so that editing it does not move it.
                    key = content if document.name is None else _hash(_encode(document.name))
                    rows.extend(
                        (number, document.position, document.span, len(data), len(document.pieces), key, content)
                    )
        return np.frombuffer(rows, dtype=np.uint64).reshape(-1, 7)

    def pieces(self, document: int) -> list[bytes]:
        """The pieces of a document; joined they are its bytes."""
        row = self.index[document].tolist()
        reader = self.readers[row[READER]]
        texts = reader.read(row[POSITION], row[SPAN])
        return [_encode(reader.joiner * (number > 0) + text) for number, text in enumerate(texts)]

    def read(self, document: int) -> bytes:
        """A document as UTF-8. The last one is cached, since its segments are usually read one after another."""
        if self._last_read[0] != document:
            self._last_read = (document, b"".join(self.pieces(document)))
        return self._last_read[1]


class Documents(Sequence[Example]):
    """The texts of one split of one domain; iterating over them reads the files.

    With `has_boundaries` every element is a document, or what decontamination left of it. Without, the elements are
    consecutive stretches of one text, to be joined as they are. `num_contaminated` is the number of pieces left out
    because they occur in train; None if that was not checked.
    """

    def __init__(self, corpus: Corpus, segments: np.ndarray | None = None, num_contaminated: int | None = None) -> None:
        self.corpus, self.num_contaminated = corpus, num_contaminated
        if segments is not None:
            self.segments = segments

    @classmethod
    def of(cls, *readers: Reader) -> "Documents":
        """All documents of the readers."""
        return cls(Corpus(readers))

    @classmethod
    def strings(cls, texts: Iterable[str]) -> "Documents":
        """Texts in memory, one document each."""
        return cls.of(Strings(texts))

    @cached_property
    def segments(self) -> np.ndarray:
        """[elements, 4] int64: document, first byte, end byte, pieces."""
        sizes, pieces = self.corpus.index[:, [SIZE, PIECES]].astype(np.int64).T
        return np.stack([np.arange(len(sizes)), np.zeros_like(sizes), sizes, pieces], axis=1)

    @property
    def has_boundaries(self) -> bool:
        """Whether the elements are separate documents."""
        return all(reader.has_boundaries for reader in self.corpus.readers)

    def __len__(self) -> int:
        return len(self.segments)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Example | Documents":
        if isinstance(index, slice):
            return Documents(self.corpus, self.segments[index], self.num_contaminated)
        document, begin, end, _ = self.segments[index].tolist()
        return Example(self.corpus.read(document)[begin:end].decode())

    def __iter__(self) -> Iterator[Example]:
        return (example for example, _ in self.iterate())

    def iterate(self, cursor: int = 0) -> Iterator[tuple[Example, int]]:
        """(element, cursor after it) from a cursor on; the elements before the cursor are not read."""
        for index in range(cursor, len(self)):
            yield self[index], index + 1

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all elements."""
        return int(self._sizes.sum())

    @property
    def num_pieces(self) -> int:
        """Number of table rows, of files, or of PIECE bytes of a long text; in proportion for documents with holes."""
        return int(self.segments[:, 3].sum())

    @property
    def num_documents(self) -> int:
        """Number of documents that the elements are segments of."""
        return len(np.unique(self.segments[:, 0]))

    @property
    def hashes(self) -> np.ndarray:
        """[elements] uint64: hash of the full document of each element."""
        return self._column(HASH)

    @property
    def repeats(self) -> int:
        """Number of elements that are equal to an earlier one."""
        keys = np.column_stack([self.hashes, self.segments[:, 1:3].astype(np.uint64)])
        return len(self) - len(np.unique(keys, axis=0))

    def fingerprint(self) -> str:
        """Hash of all texts in order."""
        hasher = hashlib.sha256(f"{self.has_boundaries}".encode())
        hasher.update(np.ascontiguousarray(self.hashes).tobytes())
        hasher.update(np.ascontiguousarray(self.segments[:, 1:3]).tobytes())
        return hasher.hexdigest()[:16]

    # Selection

    def limited(self, pieces: int | None = None, size: int | None = None) -> "Documents":
        """At most `pieces` pieces and `size` bytes: documents in the order of their hash, the last one cut."""
        limited = self if pieces is None else self._limited(self.segments[:, 3], pieces, self._cut_to_pieces)
        return limited if size is None else limited._limited(limited._sizes, size, self._cut_to_bytes)

    def split_off(self, share: float) -> tuple["Documents", "Documents"]:
        """(rest, split): up to `share` of the bytes as full documents, by hash; equal documents stay together.

        Documents that exceed the rest of the share are skipped; if none fits, the smallest is taken.
        """
        if len(self) < 2 or share == 0:
            return self, self[:0]
        sizes, goal, total = self._sizes, share * self.bytes, 0
        chosen = []
        for index in self._order(last_first=True).tolist():
            if total + sizes[index] <= goal:
                chosen.append(index)
                total += sizes[index]
            elif not self.has_boundaries or total > 0.9 * goal:
                break
        mask = np.zeros(len(self), dtype=bool)
        mask[chosen or [int(np.argmin(sizes)) if self.has_boundaries else -1]] = True
        if self.has_boundaries:
            mask = np.isin(self._column(KEY), self._column(KEY)[mask])
        return Documents(self.corpus, self.segments[~mask]), Documents(self.corpus, self.segments[mask])

    @property
    def _sizes(self) -> np.ndarray:
        sizes: np.ndarray = self.segments[:, 2] - self.segments[:, 1]
        return sizes

    def _column(self, column: int) -> np.ndarray:
        values: np.ndarray = self.corpus.index[self.segments[:, 0], column]
        return values

    def _order(self, last_first: bool = False) -> np.ndarray:
        """Indices of the elements in the order in which limits and splits take them."""
        if self.has_boundaries:
            return np.argsort(self._column(KEY), kind="stable")
        indices = np.arange(len(self))
        return indices[::-1] if last_first else indices

    def _limited(self, weights: np.ndarray, limit: int, cut: Cut) -> "Documents":
        """Elements of a total weight of at most `limit`; the first one that exceeds it is cut by `cut`."""
        if weights.sum() <= limit:
            return self
        order = self._order()
        total = np.cumsum(weights[order])
        num_uncut = int(np.searchsorted(total, limit, side="right"))
        segments = self.segments.copy()
        last, left = order[num_uncut], limit - (int(total[num_uncut - 1]) if num_uncut else 0)
        document, begin, end, pieces = segments[last].tolist()
        segments[last, 2], segments[last, 3] = cut(document, begin, end, pieces, left)
        selected = np.sort(order[: num_uncut + 1])
        selected = selected[segments[selected, 2] > segments[selected, 1]]
        return Documents(self.corpus, segments[selected], self.num_contaminated)

    def _cut_to_pieces(self, document: int, begin: int, end: int, pieces: int, left: int) -> tuple[int, int]:
        return min(end, begin + sum(map(len, self.corpus.pieces(document)[:left]))), left

    def _cut_to_bytes(self, document: int, begin: int, end: int, pieces: int, left: int) -> tuple[int, int]:
        data, cut = self.corpus.read(document), begin + left
        while cut > begin and data[cut] & 0xC0 == 0x80:  # a continuation byte: do not cut inside a character
            cut -= 1
        return cut, -(-pieces * (cut - begin) // (end - begin))


def _encode(text: str) -> bytes:
    return text.encode(errors="replace")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
