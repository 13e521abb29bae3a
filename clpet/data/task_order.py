"""The order of tasks and domains: benchmark.order, parsed here for every benchmark.

Domains of plain text can also be ordered by similarity (Yıldız et al., 2024, arXiv 2402.17400). A domain is represented
by the mean of its texts' unit vectors, normalized to length 1; similarity is the cosine. A chain goes greedily from
each domain to the most similar one that is left: it is neither a shortest path nor a sort. Ties go to the name that
sorts first, so the result depends neither on the order of files nor on the order of texts in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clpet.config.identity import digest
from clpet.config.seeding import derive
from clpet.data.domain_similarity import Vectors, centroid, cosines, domain_embeddings, sentence_embedder, unit
from clpet.errors import DataError
from clpet.records import OrderRecord

SIMPLE = ("listed", "reversed", "random")
REVERSED = "reversed_"  # prefix of an order of domains: the same chain backwards
SIMILAR = ("similar", "similar_hier")
DOMAIN_ORDERS = (*SIMPLE, *SIMILAR, *(f"{REVERSED}{rule}" for rule in ("listed", "random", *SIMILAR)))

Order = str | Sequence[str]  # a rule, the name of a published order, or an explicit list of names
Published = Mapping[str, Sequence[str]]  # published order -> names


def parse_order(names: Sequence[str], order: Order, published: Published, rules: Sequence[str]) -> str | list[str]:
    """`order` as one of `rules`, or as the list of names that it spells out or is published under.

    Of a published order only the names in `names` count. Raises DataError for an unknown rule, and for a list that
    does not contain each of `names` once.
    """
    if isinstance(order, str) and order in published:
        order = [name for name in published[order] if name in names]
    if not isinstance(order, str) and isinstance(order, Sequence):
        listed = [str(name) for name in order]
        if sorted(listed) != sorted(names):
            raise DataError(f"benchmark.order must list each of these exactly once: {', '.join(names)}")
        return listed
    if order not in rules:
        raise DataError(f"benchmark.order={order} is none of {', '.join([*rules, *published])}, nor a list of names")
    return order


def order_tasks(names: list[str], order: Order, published: Published, seed: int) -> list[str]:
    """Task names in training order; `random` is a permutation drawn from `seed`. Raises DataError as `parse_order`."""
    rule = parse_order(names, order, published, SIMPLE)
    return _simple(names, rule, seed) if isinstance(rule, str) else rule


def _simple(names: list[str], rule: str, seed: int) -> list[str]:
    if rule == "random":
        return [names[i] for i in np.random.default_rng(derive(seed, "task order")).permutation(len(names))]
    return names[::-1] if rule == "reversed" else list(names)


@dataclass(frozen=True)
class Ordering:
    """Domains in training order, with their similarities to each other [N, N] and to the reference [N], if computed."""

    names: list[str]
    order: str
    encoder: str | None = None
    similarity: np.ndarray | None = None
    reference_similarity: np.ndarray | None = None

    @property
    def hash(self) -> str:
        """Hash of the names in order."""
        return digest(self.names, 16)

    def record(self) -> OrderRecord:
        """The ordering as plain values, for run.json and results.json."""
        between, to_reference = self.similarity, self.reference_similarity
        return {
            "order": self.order,
            "hash": self.hash,
            "names": self.names,
            "encoder": self.encoder,
            "similarity": None if between is None else between.round(4).tolist(),
            "reference_similarity": None if to_reference is None else to_reference.round(4).tolist(),
        }


def order_domains(
    texts: Mapping[str, Iterable[str]],
    order: Order,
    *,
    published: Published | None = None,
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
    """The domains of `texts` ordered by one of DOMAIN_ORDERS, a published order or a list.

    `sources` maps a corpus to its domains, `parents` a domain to its group inside the corpus. `source_order` moves
    whole corpora of the resulting order. Texts are only read for orders by similarity. Raises DataError for an order
    that does not fit the domains.
    """
    names, vectors, start, encoder_name = list(texts), None, None, None
    rule = parse_order(names, order, published or {}, DOMAIN_ORDERS)
    if isinstance(rule, str) and rule.removeprefix(REVERSED) in SIMILAR:
        encoder_name, embed = sentence_embedder(encoder, cache_dir)
        vectors = domain_embeddings(texts, embed, samples)
        start = centroid(reference, embed, reference_samples) if reference else None
    ordered = arrange(names, rule, seed, vectors, start, sources, parents)
    if source_order:
        ordered = swap_sources(ordered, sources or {}, source_order)
    spelling = rule if isinstance(rule, str) else "given"
    if vectors is None:
        return Ordering(ordered, spelling)
    matrix = np.stack([vectors[name] for name in ordered])
    to_reference = None if start is None else cosines(matrix, start)
    return Ordering(ordered, spelling, encoder_name, cosines(matrix), to_reference)


def arrange(
    names: list[str],
    rule: str | list[str],
    seed: int,
    vectors: Vectors | None = None,
    reference: np.ndarray | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    parents: Mapping[str, str] | None = None,
) -> list[str]:
    """`names` ordered by a parsed order; those in SIMILAR need `vectors`."""
    if not isinstance(rule, str):
        return rule
    if rule.startswith(REVERSED):
        return arrange(names, rule.removeprefix(REVERSED), seed, vectors, reference, sources, parents)[::-1]
    if rule == "similar":
        assert vectors is not None
        return walk(vectors, reference)
    if rule == "similar_hier":
        assert vectors is not None
        return hierarchy(vectors, reference, sources or {}, parents or {})
    # A random order of domains is drawn from the sorted names, so that it does not depend on how they are listed.
    return _simple(sorted(names) if rule == "random" else names, rule, seed)


def chain(similarity: np.ndarray, start: int) -> list[int]:
    """Greedy order of the indices of `similarity` [N, N]: each is followed by the most similar one that is left.

    Ties go to the smallest index.
    """
    order, left = [start], [i for i in range(len(similarity)) if i != start]
    while left:
        order.append(max(left, key=lambda i: similarity[order[-1], i]))
        left.remove(order[-1])
    return order


def first(similarity: np.ndarray, reference: np.ndarray | None = None) -> int:
    """The first index of a chain: the most similar to the reference or, without one, on average to all others."""
    return int(np.argmax(similarity.mean(1).round(9) if reference is None else reference))


def walk(vectors: Vectors, reference: np.ndarray | None = None) -> list[str]:
    """Names in the order of a chain, starting with the one nearest to the vector `reference`."""
    names = sorted(vectors)
    matrix = np.stack([vectors[name] for name in names])
    similarity = cosines(matrix)
    to_reference = None if reference is None else cosines(matrix, reference)
    return [names[i] for i in chain(similarity, first(similarity, to_reference))]


def hierarchy(
    vectors: Vectors,
    reference: np.ndarray | None,
    sources: Mapping[str, Sequence[str]],
    parents: Mapping[str, str],
) -> list[str]:
    """Sources as listed; inside each a chain over the centroids of its groups; inside each group a chain over domains.

    Every chain continues from the end of the previous one, the first from the reference. A domain without a parent
    forms a group by itself; domains without a source come last. Raises DataError for a domain of two sources.
    """
    order: list[str] = []
    previous_centroid = reference
    for members in _members_by_source(list(vectors), sources).values():
        groups: dict[str, list[str]] = {}
        for name in members:
            groups.setdefault(parents.get(name, name), []).append(name)
        centroids = {group: unit(np.mean([vectors[n] for n in sorted(names)], 0)) for group, names in groups.items()}
        for group in walk(centroids, previous_centroid):
            previous_domain = vectors[order[-1]] if order else reference
            order += walk({name: vectors[name] for name in groups[group]}, previous_domain)
            previous_centroid = centroids[group]
    return order


def swap_sources(order: Sequence[str], sources: Mapping[str, Sequence[str]], source_order: Sequence[str]) -> list[str]:
    """`order` with its sources in `source_order`; inside a source it stays. Raises DataError for unknown sources."""
    members = _members_by_source(order, sources)
    if sorted(source_order) != sorted(members):
        raise DataError(f"benchmark.source_order must list each source exactly once: {', '.join(members)}")
    return [name for source in source_order for name in order if name in members[source]]


def _members_by_source(names: Sequence[str], sources: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """{source: those of `names` that it contains, sorted}; names without a source are in a last one, `rest`."""
    members = {source: sorted(set(domains).intersection(names)) for source, domains in sources.items()}
    listed = [name for domains in members.values() for name in domains]
    if len(set(listed)) < len(listed):
        raise DataError(f"a domain belongs to two sources: {max(listed, key=listed.count)}")
    members["rest"] = sorted(set(names).difference(listed))
    return {source: domains for source, domains in members.items() if domains}


def balanced(sizes: Sequence[int], balance: str) -> list[int]:
    """The size of each domain's part that is used.

    `none` uses all, `min` as much of each domain as the smallest one has, `cap=B` at most B of each.
    """
    if balance == "none":
        return list(sizes)
    rule, _, number = balance.partition("=")
    if balance != "min" and not (rule == "cap" and number.isdecimal() and int(number)):
        raise DataError(f"benchmark.balance must be none, min or cap=NUMBER, not {balance}")
    limit = min(sizes) if balance == "min" else int(number)
    return [min(size, limit) for size in sizes]
