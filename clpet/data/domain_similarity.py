"""Similarity of domains by the embeddings of their texts."""

import hashlib
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clpet.errors import DataError, ModelError

log = logging.getLogger(__name__)

PIECE = 500  # characters of a text that one vector stands for
TOKENS = 128  # of them that a sentence encoder reads
Embed = Callable[[Sequence[str]], Any]  # texts -> [n, dim], dense or sparse
Vectors = Mapping[str, np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def cosines(vectors: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """[n, n] between rows, or [n] to one other vector; rounded, so that what is equal but for rounding ties."""
    rows = unit(np.asarray(vectors, dtype=float))
    return (rows @ (rows.T if other is None else unit(np.asarray(other, dtype=float)))).round(9)


def domain_embeddings(texts: Mapping[str, Iterable[str]], embed: Embed, samples: int) -> dict[str, np.ndarray]:
    """A unit vector per domain, from up to `samples` pieces of its texts. Raises DataError for one without text."""
    found = {}
    for name in sorted(texts):
        vector = centroid(texts[name], embed, samples)
        if vector is None:
            raise DataError(f"domain {name} has no text to compare it by")
        found[name] = vector
    return found


def centroid(texts: Iterable[str], embed: Embed, samples: int) -> np.ndarray | None:
    """The mean of unit vectors of up to `samples` pieces, as a unit vector; None where there is no text."""
    from sklearn.preprocessing import normalize

    drawn = draw(texts, samples)
    return unit(np.asarray(normalize(embed(drawn)).mean(axis=0), dtype=float).ravel()) if drawn else None


def draw(texts: Iterable[str], count: int) -> list[str]:
    """Up to `count` different pieces, those whose hashes are smallest: the same from any order of the texts."""
    unlike = {hashlib.sha256(piece.encode(errors="surrogatepass")).digest(): piece for piece in pieces(texts)}
    return [unlike[key] for key in heapq.nsmallest(count, unlike)]


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut between words into pieces of at most PIECE characters, where words are not longer."""
    for text in texts:
        words: list[str] = []
        length = 0
        for word in text.split():
            if words and length + len(word) > PIECE:
                yield " ".join(words)
                words, length = [], 0
            words.append(word)
            length += len(word) + 1
        if words:
            yield " ".join(words)


def sentence_embedder(name: str, cache_dir: str | None) -> tuple[str, Embed]:
    """(what the record calls it, the function). `auto` is minilm where it can be had, else `hashed` word 1-2-grams."""
    if name != "hashed":
        from clpet.models.sentence_encoder import Encoder, locate

        try:
            encoder = Encoder(locate("minilm" if name == "auto" else name), TOKENS, _device(), cache_dir)
        except ModelError as error:
            if name != "auto":
                raise
            log.warning("domains are compared by hashed word pairs: %s", error)
        else:
            return "minilm" if name == "auto" else name, lambda texts: encoder.encode(texts).numpy()
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(n_features=2**14, ngram_range=(1, 2), stop_words="english")
    return "hashed (no sentence encoder)", vectorizer.transform


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
