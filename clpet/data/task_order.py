"""Orders of domains for continual pretraining (Yıldız et al., 2024, arXiv 2402.17400): chains of similar domains.

A domain is the mean of its texts' unit vectors, itself made a unit vector; similarity is the cosine. A chain goes
from each domain to the most similar one that is left: it is no best path and no sort. Ties go to the smallest name,
and neither the order of files nor that of texts in them changes anything.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clpet.config.identity import digest
from clpet.config.seeding import derive
from clpet.data.domain_similarity import Vectors, centroid, cosines, domain_embeddings, sentence_embedder, unit
from clpet.errors import DataError

log = logging.getLogger(__name__)

ORDERS = ("listed", "random", "similar", "similar_hier")  # each also with reversed_ before it


@dataclass(frozen=True)
class Ordering:
    """Domains in training order; the similarities [N, N] and to the reference [N] in that order, where computed."""

    names: list[str]
    order: str
    encoder: str | None = None
    similarity: np.ndarray | None = None
    reference_similarity: np.ndarray | None = None

    @property
    def hash(self) -> str:
        """Of the names in order alone."""
        return digest(self.names, 16)

    def record(self) -> dict[str, Any]:
        """What the data record keeps: plain values."""
        found: dict[str, Any] = {"order": self.order, "hash": self.hash, "names": self.names, "encoder": self.encoder}
        for name in ("similarity", "reference_similarity"):
            values = getattr(self, name)
            found[name] = None if values is None else values.round(4).tolist()
        return found


def order_domains(
    texts: Mapping[str, Iterable[str]],
    order: str | Sequence[str],
    *,
    seed: int = 0,
    reference: Iterable[str] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    parents: Mapping[str, str] | None = None,
    source_order: Sequence[str] | None = None,
    samples: int = 10_000,
    reference_samples: int = 50_000,
    encoder: str = "auto",
    cache_dir: str | None = None,
) -> Ordering:
    """The domains of `texts` in an order of ORDERS or the given one; texts are only read where they are compared.

    `sources` are the corpora and their domains, `parents` the group of a domain inside its source. `source_order`
    swaps whole sources of the order found. Raises DataError for an order that does not fit the domains.
    """
    names, vectors, near, used = list(texts), None, None, None
    kind = order.removeprefix("reversed_") if isinstance(order, str) else "given"
    if kind in ("similar", "similar_hier"):
        used, embed = sentence_embedder(encoder, cache_dir)
        vectors = domain_embeddings(texts, embed, samples)
        near = centroid(reference, embed, reference_samples) if reference else None
    found = arranged(names, order, seed, vectors, near, sources, parents)
    if source_order:
        found = swapped(found, sources or {}, source_order)
    if vectors is None:
        return Ordering(found, _spelt(order))
    matrix = np.stack([vectors[name] for name in found])
    return Ordering(found, _spelt(order), used, cosines(matrix), None if near is None else cosines(matrix, near))


def _spelt(order: str | Sequence[str]) -> str:
    return order if isinstance(order, str) else "given"


def arranged(
    names: list[str],
    order: str | Sequence[str],
    seed: int,
    vectors: Vectors | None = None,
    reference: np.ndarray | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    parents: Mapping[str, str] | None = None,
) -> list[str]:
    """`names` in an order; the similar ones need `vectors`. Raises DataError for an order that there is not."""
    if not isinstance(order, str):
        if sorted(order) != sorted(names):
            raise DataError(f"benchmark.order must list every domain once; the domains are: {', '.join(sorted(names))}")
        return list(order)
    if order == "reversed":
        return names[::-1]
    if order.startswith("reversed_"):
        return arranged(names, order.removeprefix("reversed_"), seed, vectors, reference, sources, parents)[::-1]
    if order == "listed":
        return list(names)
    if order == "random":
        known = sorted(names)
        return [known[i] for i in np.random.default_rng(derive(seed, "task order")).permutation(len(known))]
    if order == "similar" and vectors is not None:
        return walk(vectors, reference)
    if order == "similar_hier" and vectors is not None:
        return hierarchy(vectors, reference, sources or {}, parents or {})
    raise DataError(f"benchmark.order={order} is none of {', '.join(ORDERS)}, reversed, nor a list of domains")


def chain(similarity: np.ndarray, start: int) -> list[int]:
    """Positions in greedy order: from each one to the most similar that is left, ties to the smallest position."""
    order, left = [start], [i for i in range(len(similarity)) if i != start]
    while left:
        order.append(max(left, key=lambda i: similarity[order[-1], i]))
        left.remove(order[-1])
    return order


def first(similarity: np.ndarray, reference: np.ndarray | None = None) -> int:
    """Where a chain starts: most similar to the reference or, without one, on average to all others."""
    return int(np.argmax(similarity.mean(1).round(9) if reference is None else reference))


def walk(vectors: Vectors, reference: np.ndarray | None = None) -> list[str]:
    """Names in greedy order, from the one nearest to the vector `reference`."""
    names = sorted(vectors)
    matrix = np.stack([vectors[name] for name in names])
    similarity = cosines(matrix)
    near = None if reference is None else cosines(matrix, reference)
    return [names[i] for i in chain(similarity, first(similarity, near))]


def hierarchy(
    vectors: Vectors,
    reference: np.ndarray | None,
    sources: Mapping[str, Sequence[str]],
    parents: Mapping[str, str],
) -> list[str]:
    """Sources as listed; inside each a chain over its groups' centroids; inside each group a chain over its domains.

    Every chain goes on from where the one before it ended, the first from the reference. A domain without a parent
    is a group of its own, domains of no source come last. Raises DataError for a domain of two sources.
    """
    order: list[str] = []
    place = reference
    for members in _sources(list(vectors), sources).values():
        groups: dict[str, list[str]] = {}
        for name in members:
            groups.setdefault(parents.get(name, name), []).append(name)
        centroids = {group: unit(np.mean([vectors[n] for n in sorted(own)], 0)) for group, own in groups.items()}
        for group in walk(centroids, place):
            before = vectors[order[-1]] if order else reference
            order += walk({name: vectors[name] for name in groups[group]}, before)
            place = centroids[group]
    return order


def swapped(order: Sequence[str], sources: Mapping[str, Sequence[str]], source_order: Sequence[str]) -> list[str]:
    """An order with whole sources exchanged: each keeps its inner order. Raises DataError for unknown sources."""
    own = _sources(order, sources)
    if sorted(source_order) != sorted(own):
        raise DataError(f"benchmark.source_order must list every source once: {', '.join(own)}")
    return [name for source in source_order for name in order if name in own[source]]


def _sources(names: Sequence[str], sources: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The sources that have one of `names`, each with those, sorted; what no source has is a last one, `rest`."""
    found = {source: sorted(set(members).intersection(names)) for source, members in sources.items()}
    listed = [name for members in found.values() for name in members]
    if len(set(listed)) < len(listed):
        raise DataError(f"a domain belongs to two sources: {max(listed, key=listed.count)}")
    found["rest"] = sorted(set(names).difference(listed))
    return {source: members for source, members in found.items() if members}


def balanced(sizes: Sequence[int], balance: str) -> list[int]:
    """How much of each domain is used: `none` all, `min` as much as of the smallest, `cap=B` at most B each."""
    if balance == "none":
        return list(sizes)
    rule, _, number = balance.partition("=")
    if balance != "min" and not (rule == "cap" and number.isdecimal() and int(number)):
        raise DataError(f"benchmark.balance must be none, min or cap=NUMBER, not {balance}")
    limit = min(sizes) if balance == "min" else int(number)
    return [min(size, limit) for size in sizes]
