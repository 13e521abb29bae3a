"""Pieces of test texts that also occur in train: found anywhere in it, in one pass, in memory of the test's size."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np

from clpet.data.documents import Documents

WINDOW = 200  # characters of a piece
STEP = 1 << 19  # characters of train that are looked at together
BORDER = "\0"


def decontaminated(tests: Sequence[Documents], trains: Iterable[Documents]) -> list[Documents]:
    """The test texts without the pieces that occur in any of `trains`; a document with a hole becomes two.

    A test document is cut into pieces of WINDOW characters, the last of which ends with it; shorter documents are
    kept. `num_contaminated` of the result counts the pieces left out.
    """
    hashes = [[piece_hashes(example.text) for example in test] for test in tests]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(part for test in hashes for part in test)]))
    seen = occurring(known, trains)
    return [
        _without(test, [seen[np.searchsorted(known, part)] for part in parts])
        for test, parts in zip(tests, hashes, strict=True)
    ]


def starts(length: int) -> np.ndarray:
    """Where the pieces of a text begin: end to end, the last one ends with the text; none in a shorter text."""
    if length < WINDOW:
        return np.zeros(0, dtype=np.int64)
    return np.append(np.arange(0, length - WINDOW, WINDOW), length - WINDOW)


def piece_hashes(text: str) -> np.ndarray:
    """[pieces] uint64."""
    return window_hashes(text)[starts(len(text))]


def window_hashes(text: str) -> np.ndarray:
    """[characters - WINDOW + 1] uint64: the polynomial hash modulo 2^64 of every WINDOW characters in a row.

    With base b and prefix sums S_i = Σ_{j<i} c_j b^j, that of the window at i is (S_{i+W} − S_i) / b^i.
    """
    if len(text) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32).astype(np.uint64)
    codes = (codes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    codes ^= codes >> np.uint64(32)
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    return (sums[WINDOW:] - sums[:-WINDOW]) * inverses[: len(codes) - WINDOW + 1]


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    base = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
    inverse = pow(base, -1, 1 << 64)
    found = []
    for number in (base, inverse):
        powers = np.full(count, number, dtype=np.uint64)
        powers[0] = 1
        found.append(np.multiply.accumulate(powers))
    return found[0], found[1]


def occurring(known: np.ndarray, trains: Iterable[Documents]) -> np.ndarray:
    """[known] bool: which of the sorted hashes are those of a window of the texts."""
    seen = np.zeros(len(known), dtype=bool)
    if not len(known):
        return seen
    bits = 4 + len(known).bit_length()  # of a hash, looked up first: few windows get further
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, dtype=bool)
    table[known >> shift] = True
    for train in trains:
        for text in _stretches(train):
            hashes = window_hashes(text)
            hashes = hashes[table[hashes >> shift]]
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            seen[places[known[places] == hashes]] = True
    return seen


def _stretches(documents: Documents) -> Iterator[str]:
    """The texts in stretches of about STEP characters, which overlap by less than a window."""
    border = BORDER if documents.has_boundaries else ""
    parts, length = [""], 0
    for example in documents:
        for begin in range(0, len(example.text), STEP):
            parts.append(example.text[begin : begin + STEP])
            length += len(parts[-1])
            if length >= STEP:
                text = "".join(parts)
                yield text
                parts, length = [text[1 - WINDOW :]], 0
        parts.append(border)
    yield "".join(parts)


def _without(test: Documents, repeated: list[np.ndarray]) -> Documents:
    """`test` without the pieces that are repeated, given per element."""
    segments: list[list[int]] = []
    for place, pieces in enumerate(repeated):
        unit, first, last, count = test.segments[place].tolist()
        if not pieces.any():
            segments.append([unit, first, last, count])
            continue
        text = test[place].text
        keep = np.ones(len(text), dtype=bool)
        for start in starts(len(text))[pieces]:
            keep[start : start + WINDOW] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
        for begin, end in edges.reshape(-1, 2).tolist():
            skipped, size = len(text[:begin].encode()), len(text[begin:end].encode())
            segments.append([unit, first + skipped, first + skipped + size, -(-count * size // (last - first))])
    num_contaminated = sum(int(pieces.sum()) for pieces in repeated)
    return Documents(test.corpus, np.array(segments, dtype=np.int64).reshape(-1, 4), num_contaminated)
