"""Removes pieces of test texts that also occur anywhere in train.

One pass over train with a rolling hash suffices, and memory is proportional to the size of the test texts.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np

from clpet.data.documents import Documents

WINDOW = 200  # characters of a piece
STEP = 1 << 19  # characters of train that are hashed together
BOUNDARY = "\0"  # between documents, so that no window spans two of them


def decontaminate(tests: Sequence[Documents], trains: Iterable[Documents]) -> list[Documents]:
    """The test texts without the pieces that occur in any of `trains`; a document with a hole becomes two elements.

    A test document is divided into pieces of WINDOW characters, the last of which ends with the document; shorter
    documents are not checked. `num_contaminated` of the result is the number of pieces left out.
    """
    hashes = [[piece_hashes(example.text) for example in test] for test in tests]
    test_hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *(row for test in hashes for row in test)]))
    in_train = occur_in(test_hashes, trains)
    return [
        _without(test, [in_train[np.searchsorted(test_hashes, row)] for row in rows])
        for test, rows in zip(tests, hashes, strict=True)
    ]


def starts(length: int) -> np.ndarray:
    """Offsets of the pieces of a text: end to end, except that the last one ends with the text. None if it is short."""
    if length < WINDOW:
        return np.zeros(0, dtype=np.int64)
    return np.append(np.arange(0, length - WINDOW, WINDOW), length - WINDOW)


def piece_hashes(text: str) -> np.ndarray:
    """[pieces] uint64: the hash of each piece of a text."""
    hashes: np.ndarray = window_hashes(text)[starts(len(text))]
    return hashes


def window_hashes(text: str) -> np.ndarray:
    """[characters - WINDOW + 1] uint64: the polynomial hash modulo 2^64 of every WINDOW consecutive characters.

    With base b and prefix sums S_i = Σ_{j<i} c_j b^j, that of the window at i is (S_{i+W} − S_i) / b^i.
    """
    if len(text) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32).astype(np.uint64)
    # Mixing the codes first: small integers would leave most bits of a polynomial hash badly distributed.
    codes = (codes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    codes ^= codes >> np.uint64(32)
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    hashes: np.ndarray = (sums[WINDOW:] - sums[:-WINDOW]) * inverses[: len(codes) - WINDOW + 1]
    return hashes


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` powers of the base and of its inverse modulo 2^64."""
    base = 0x9E3779B97F4A7C15  # odd, so it has an inverse
    inverse = pow(base, -1, 1 << 64)
    return _accumulated(base, count), _accumulated(inverse, count)


def _accumulated(number: int, count: int) -> np.ndarray:
    powers = np.full(count, number, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def occur_in(hashes: np.ndarray, texts: Iterable[Documents]) -> np.ndarray:
    """[hashes] bool: which of the sorted hashes equal the hash of a window of the texts."""
    seen = np.zeros(len(hashes), dtype=bool)
    if not len(hashes):
        return seen
    # A table of the first bits rules out most windows before the binary search, which is much slower.
    bits = 4 + len(hashes).bit_length()
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, dtype=bool)
    table[hashes >> shift] = True
    for documents in texts:
        for text in _stretches(documents):
            windows = window_hashes(text)
            windows = windows[table[windows >> shift]]
            indices = np.minimum(np.searchsorted(hashes, windows), len(hashes) - 1)
            seen[indices[hashes[indices] == windows]] = True
    return seen


def _stretches(documents: Documents) -> Iterator[str]:
    """The texts in stretches of about STEP characters, which overlap by WINDOW - 1 so that no window is missed."""
    boundary = BOUNDARY if documents.has_boundaries else ""
    pieces, length = [""], 0
    for example in documents:
        for begin in range(0, len(example.text), STEP):
            pieces.append(example.text[begin : begin + STEP])
            length += len(pieces[-1])
            if length >= STEP:
                text = "".join(pieces)
                yield text
                pieces, length = [text[1 - WINDOW :]], 0
        pieces.append(boundary)
    yield "".join(pieces)


def _without(test: Documents, repeated: list[np.ndarray]) -> Documents:
    """`test` without its repeated pieces; `repeated` is one boolean array per element."""
    segments: list[list[int]] = []
    for index, pieces in enumerate(repeated):
        document, first, last, count = test.segments[index].tolist()
        if not pieces.any():
            segments.append([document, first, last, count])
            continue
        text = test[index].text
        keep = np.ones(len(text), dtype=bool)
        for start in starts(len(text))[pieces]:
            keep[start : start + WINDOW] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
        for begin, end in edges.reshape(-1, 2).tolist():
            skipped, size = len(text[:begin].encode()), len(text[begin:end].encode())
            segments.append([document, first + skipped, first + skipped + size, -(-count * size // (last - first))])
    num_contaminated = sum(int(pieces.sum()) for pieces in repeated)
    return Documents(test.corpus, np.array(segments, dtype=np.int64).reshape(-1, 4), num_contaminated)
