"""Documents: a lazy sequence of plain texts over files, so that a domain of gigabytes never lies in memory.

One pass over the files notes where every document lies, its size and its hash (56 bytes a document). Everything
else is a choice of segments (document, first byte, last byte): splits, limits, documents with holes. Splits and
limits go by the hash of a document, so they depend neither on the order of the files nor on other domains. A text
without document borders is cut as it stands: its beginning is what a limit keeps, its end what a split cuts off.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from clpet.data.benchmark import Example
from clpet.data.document_readers import Reader, Strings

Cut = Callable[[int, int, int, int, int], tuple[int, int]]  # (segment, what is left) -> its new end and pieces
READER, PLACE, SPAN, SIZE, PIECES, KEY, HASH = range(7)  # columns of the index


class Corpus:
    """Readers and the index of what they hold."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self._last: tuple[int, bytes] = (-1, b"")

    @cached_property
    def index(self) -> np.ndarray:
        """[documents, 7] uint64: columns as named above; documents without text are left out and counted."""
        found = array("Q")
        for number, reader in enumerate(self.readers):
            for unit in reader.scan():
                data = _bytes(reader.joiner.join(unit.pieces))
                reader.report.read[reader.name] += 1
                if not data.strip():
                    reader.report.drop("without text", 1)
                else:
                    content = _hash(data)
                    key = content if unit.name is None else _hash(_bytes(unit.name))
                    found.extend((number, unit.place, unit.span, len(data), len(unit.pieces), key, content))
        return np.frombuffer(found, dtype=np.uint64).reshape(-1, 7)

    def pieces(self, unit: int) -> list[bytes]:
        """The pieces of a document; joined they are its bytes."""
        row = self.index[unit].tolist()
        reader = self.readers[row[READER]]
        found = reader.read(row[PLACE], row[SPAN])
        return [_bytes(reader.joiner * (number > 0) + piece) for number, piece in enumerate(found)]

    def read(self, unit: int) -> bytes:
        """A document as UTF-8; the last one read is kept, for its next segment."""
        if self._last[0] != unit:
            self._last = (unit, b"".join(self.pieces(unit)))
        return self._last[1]


class Documents(Sequence[Example]):
    """Texts of one split of one domain; iterating reads the files.

    `num_contaminated` pieces were found in train and left out; None where nobody has looked.

    With `has_boundaries` every element is a document (or what a hole left of it); without, elements are consecutive
    stretches of one text, to be joined as they are.
    """

    def __init__(self, corpus: Corpus, segments: np.ndarray | None = None, num_contaminated: int | None = None) -> None:
        self.corpus, self.num_contaminated = corpus, num_contaminated
        if segments is not None:
            self.segments = segments

    @classmethod
    def of(cls, *readers: Reader) -> "Documents":
        """All that the readers hold."""
        return cls(Corpus(readers))

    @classmethod
    def strings(cls, texts: Iterable[str]) -> "Documents":
        """Texts in memory, one document each."""
        return cls.of(Strings(texts))

    @cached_property
    def segments(self) -> np.ndarray:
        """[elements, 4] int64: document, first byte, byte after the last, pieces."""
        sizes, pieces = self.corpus.index[:, [SIZE, PIECES]].astype(np.int64).T
        return np.stack([np.arange(len(sizes)), np.zeros_like(sizes), sizes, pieces], axis=1)

    @property
    def has_boundaries(self) -> bool:
        """Whether elements are documents of their own."""
        return all(reader.has_boundaries for reader in self.corpus.readers)

    def __len__(self) -> int:
        return len(self.segments)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Documents": ...
    def __getitem__(self, place: int | slice) -> "Example | Documents":
        if isinstance(place, slice):
            return Documents(self.corpus, self.segments[place], self.num_contaminated)
        unit, begin, end, _ = self.segments[place].tolist()
        return Example(self.corpus.read(unit)[begin:end].decode())

    def __iter__(self) -> Iterator[Example]:
        return (example for example, _ in self.iterate())

    def iterate(self, cursor: int = 0) -> Iterator[tuple[Example, int]]:
        """(element, cursor behind it) from a cursor on; what lies before it is not read again."""
        for place in range(cursor, len(self)):
            yield self[place], place + 1

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all elements."""
        return int(self._sizes.sum())

    @property
    def num_pieces(self) -> int:
        """Rows of a table, files, or PIECE bytes of a long text; of documents with holes in proportion."""
        return int(self.segments[:, 3].sum())

    @property
    def units(self) -> int:
        """Documents of which elements are parts."""
        return len(np.unique(self.segments[:, 0]))

    @property
    def hashes(self) -> np.ndarray:
        """[elements] uint64: of the whole documents."""
        return self._column(HASH)

    @property
    def repeats(self) -> int:
        """Elements that are equal to another one before them."""
        keys = np.column_stack([self.hashes, self.segments[:, 1:3].astype(np.uint64)])
        return len(self) - len(np.unique(keys, axis=0))

    def fingerprint(self) -> str:
        """Hash of all texts in order."""
        found = hashlib.sha256(f"{self.has_boundaries}".encode())
        found.update(np.ascontiguousarray(self.hashes).tobytes())
        found.update(np.ascontiguousarray(self.segments[:, 1:3]).tobytes())
        return found.hexdigest()[:16]

    # Choosing

    def limited(self, pieces: int | None = None, size: int | None = None) -> "Documents":
        """At most so many pieces and bytes: documents by their hash, the last one cut."""
        kept = self if pieces is None else self._limited(self.segments[:, 3], pieces, self._first_pieces)
        return kept if size is None else kept._limited(kept._sizes, size, self._first_bytes)

    def split_off(self, share: float) -> tuple["Documents", "Documents"]:
        """(rest, part): up to `share` of the bytes in whole documents, by their hash; equal documents stay together.

        Documents that do not fit are passed over; if none fits, the smallest is taken.
        """
        if len(self) < 2 or share == 0:
            return self, self[:0]
        sizes, goal, taken = self._sizes, share * self.bytes, 0
        chosen = []
        for place in self._order(last=True).tolist():
            if taken + sizes[place] <= goal:
                chosen.append(place)
                taken += sizes[place]
            elif not self.has_boundaries or taken > 0.9 * goal:
                break
        part = np.zeros(len(self), dtype=bool)
        part[chosen or [int(np.argmin(sizes)) if self.has_boundaries else -1]] = True
        if self.has_boundaries:
            part = np.isin(self._column(KEY), self._column(KEY)[part])
        return Documents(self.corpus, self.segments[~part]), Documents(self.corpus, self.segments[part])

    @property
    def _sizes(self) -> np.ndarray:
        return self.segments[:, 2] - self.segments[:, 1]

    def _column(self, column: int) -> np.ndarray:
        return self.corpus.index[self.segments[:, 0], column]

    def _order(self, last: bool = False) -> np.ndarray:
        """Places in the order in which they are chosen."""
        if self.has_boundaries:
            return np.argsort(self._column(KEY), kind="stable")
        places = np.arange(len(self))
        return places[::-1] if last else places

    def _limited(self, weights: np.ndarray, most: int, cut: Cut) -> "Documents":
        if weights.sum() <= most:
            return self
        order = self._order()
        total = np.cumsum(weights[order])
        whole = int(np.searchsorted(total, most, side="right"))
        segments = self.segments.copy()
        last, left = order[whole], most - (int(total[whole - 1]) if whole else 0)
        unit, begin, end, pieces = segments[last].tolist()
        segments[last, 2], segments[last, 3] = cut(unit, begin, end, pieces, left)
        kept = np.sort(order[: whole + 1])
        kept = kept[segments[kept, 2] > segments[kept, 1]]
        return Documents(self.corpus, segments[kept], self.num_contaminated)

    def _first_pieces(self, unit: int, begin: int, end: int, pieces: int, left: int) -> tuple[int, int]:
        return min(end, begin + sum(map(len, self.corpus.pieces(unit)[:left]))), left

    def _first_bytes(self, unit: int, begin: int, end: int, pieces: int, left: int) -> tuple[int, int]:
        data, place = self.corpus.read(unit), begin + left
        while place > begin and data[place] & 0xC0 == 0x80:  # inside a character
            place -= 1
        return place, -(-pieces * (place - begin) // (end - begin))


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
