"""Similarity of domains: the cosine of the mean embeddings of their texts."""

import hashlib
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from clpet.errors import DataError, ModelError, need_package

log = logging.getLogger(__name__)

PIECE = 500  # characters of a text per embedding
TOKENS = 128  # maximum tokens of a piece that a sentence encoder reads
Embed = Callable[[Sequence[str]], object]  # texts -> [n, dim], dense or sparse
Vectors = Mapping[str, np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors scaled to length 1; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = vectors / np.where(lengths > 0, lengths, 1)
    return scaled


def cosines(vectors: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """[n, n] between the rows, or [n] to one `other` vector.

    Rounded, so that similarities that differ only by floating-point errors tie on every machine.
    """
    rows = unit(np.asarray(vectors, dtype=float))
    similarity: np.ndarray = rows @ (rows.T if other is None else unit(np.asarray(other, dtype=float)))
    return similarity.round(9)


def domain_embeddings(texts: Mapping[str, Iterable[str]], embed: Embed, samples: int) -> dict[str, np.ndarray]:
    """A unit vector per domain, from up to `samples` pieces of its texts. Raises DataError if it has none."""
    embeddings = {}
    for name in sorted(texts):
        vector = centroid(texts[name], embed, samples)
        if vector is None:
            raise DataError(f"domain {name} has no text to compare it by")
        embeddings[name] = vector
    return embeddings


def centroid(texts: Iterable[str], embed: Embed, samples: int) -> np.ndarray | None:
    """The mean of the unit vectors of up to `samples` pieces, scaled to length 1; None if there is no text."""
    from sklearn.preprocessing import normalize

    sample = sample_pieces(texts, samples)
    return unit(np.asarray(normalize(embed(sample)).mean(axis=0), dtype=float).ravel()) if sample else None


def sample_pieces(texts: Iterable[str], count: int) -> list[str]:
    """Up to `count` distinct pieces, those with the smallest hashes: the order of the texts does not matter."""
    by_hash = {hashlib.sha256(piece.encode(errors="surrogatepass")).digest(): piece for piece in split_pieces(texts)}
    return [by_hash[key] for key in heapq.nsmallest(count, by_hash)]


def split_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut between words into pieces of about PIECE characters; a longer word is a piece of its own."""
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
    """(name for the record, function). `auto` is minilm if it is available, else `hashed`: word 1- and 2-grams."""
    need_package("sklearn", "sklearn", "the order of domains by similarity")
    if name != "hashed":
        # Imported here: most orders need no encoder, and this one loads torch and transformers.
        from clpet.models.sentence_encoder import Encoder, locate

        try:
            encoder = Encoder(locate("minilm" if name == "auto" else name), TOKENS, _device(), cache_dir)
        except ModelError as error:
            if name != "auto":
                raise
            log.warning("domains are compared by hashed words and word pairs instead of embeddings: %s", error)
        else:
            return "minilm" if name == "auto" else name, lambda texts: encoder.encode(texts).numpy()
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(n_features=2**14, ngram_range=(1, 2), stop_words="english")
    return "hashed (no sentence encoder)", vectorizer.transform


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
