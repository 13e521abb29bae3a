"""Orders of tasks and domains: greedy chains on small similarity matrices, and invariances of an order."""

import itertools

import numpy as np
import pytest

from clpet.data.domain_similarity import cosines, domain_embeddings, sample_pieces, split_pieces
from clpet.data.task_order import (
    Ordering,
    arrange,
    balanced,
    chain,
    first,
    hierarchy,
    order_domains,
    order_tasks,
    swap_sources,
    walk,
)
from clpet.errors import DataError, ModelError

S4 = np.array([[1, 0.9, 0.8, 0.2], [0.9, 1, 0.3, 0.4], [0.8, 0.3, 1, 0.1], [0.2, 0.4, 0.1, 1]])
S5 = np.array([[1, 0.9, 0.1, 0.2, 0.3], [0.9, 1, 0.3, 0.8, 0.2], [0.1, 0.3, 1, 0.4, 0.7],
               [0.2, 0.8, 0.4, 1, 0.5], [0.3, 0.2, 0.7, 0.5, 1]])  # fmt: skip
R5 = np.array([0.2, 0.3, 0.25, 0.6, 0.1])
TEXTS = {
    "birds": ["the robin sings in the morning garden", "a heron waits in the river reeds", "robin and heron feathers"],
    "boats": ["the sailing boat leaves the harbour", "a heron sits on the harbour boat", "sailing in the river"],
    "metals": ["molten iron and copper", "copper wire conducts heat", "iron rusts in water"],
    "motors": ["the iron engine runs hot", "copper wire winds the motor", "engine oil and motor heat"],
}


def along(similarity: np.ndarray, order: list[int]) -> float:
    return round(sum(similarity[a, b] for a, b in itertools.pairwise(order)), 6)


def angle(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def test_a_chain_is_greedy() -> None:
    """Neither the best path from 0 nor the sort by similarity to it, which is 0, 1, 2, 3."""
    assert chain(S4, 0) == [0, 1, 3, 2]
    assert along(S4, chain(S4, 0)) == 1.4
    best = max(itertools.permutations([1, 2, 3]), key=lambda rest: along(S4, [0, *rest]))
    assert [0, *best] == [0, 2, 1, 3]
    assert along(S4, [0, *best]) == 1.5


def test_a_chain_from_a_reference() -> None:
    start = first(S5, R5)
    assert start == 3
    assert chain(S5, start) == [3, 1, 0, 4, 2]
    assert along(S5, [3, 1, 0, 4, 2]) == 2.7
    assert along(S5, [0, 1, 3, 4, 2]) == 2.9  # the best path is another one
    assert np.argsort(-R5).tolist() == [3, 1, 2, 0, 4]  # and so is the sort


def test_without_a_reference_the_chain_starts_at_the_most_central_domain() -> None:
    """Row sums of S4 are 2.9, 2.6, 2.2, 1.7."""
    assert first(S4) == 0
    assert first(S4[::-1, ::-1]) == 3


def test_ties_go_to_the_smallest_name() -> None:
    assert chain(np.ones((5, 5)), 3) == [3, 0, 1, 2, 4]
    assert walk({name: np.array([2.0, 1.0]) for name in "cab"}) == ["a", "b", "c"]


def test_scaling_and_the_order_of_input_change_nothing() -> None:
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=5) for name in "hgfedcba"}
    reference = rng.normal(size=5)
    order = walk(vectors, reference)
    assert sorted(order) == list("abcdefgh")
    for _ in range(20):
        names = [str(name) for name in rng.permutation(list(vectors))]
        assert walk({name: vectors[name] * rng.uniform(0.01, 100) for name in names}, 7 * reference) == order


def test_similarities_are_symmetric_with_ones() -> None:
    similarity = cosines(np.random.default_rng(0).normal(size=(6, 4)))
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_array_equal(np.diag(similarity), np.ones(6))
    assert cosines(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([0.0, 9.0])).tolist() == [0.8, 0]


def test_a_hierarchy_walks_groups_and_then_domains() -> None:
    """Angles in degrees. From 65: group B (50) and in it 60 first, then A (10), then c100, a group of its own; the
    second source continues from there."""
    places = {"a0": 0, "a20": 20, "b40": 40, "b60": 60, "c100": 100, "d30": 30, "d80": 80}
    vectors = {name: angle(place) for name, place in places.items()}
    parents = {name: name[0].upper() for name in places if name != "c100"}
    sources = {"wiki": ["b40", "b60", "a0", "a20", "c100"], "papers": ["d80", "d30"]}
    assert hierarchy(vectors, angle(65), sources, parents) == ["b60", "b40", "a20", "a0", "c100", "d80", "d30"]
    assert hierarchy(vectors, angle(-5), sources, parents) == ["a0", "a20", "b40", "b60", "c100", "d80", "d30"]
    without = {"wiki": sources["wiki"]}
    assert hierarchy(vectors, angle(-5), without, parents)[-2:] == ["d80", "d30"]  # of no source: last


def test_swapped_sources_keep_their_inner_order() -> None:
    sources = {"wiki": ["a", "b"], "papers": ["c", "d"]}
    assert swap_sources(["b", "a", "d", "c"], sources, ["papers", "wiki"]) == ["d", "c", "b", "a"]
    with pytest.raises(DataError, match="source_order must list each source exactly once: wiki, papers"):
        swap_sources(["b", "a", "d", "c"], sources, ["papers"])
    with pytest.raises(DataError, match="two sources: b"):
        swap_sources(["a", "b"], {"wiki": ["a", "b"], "papers": ["b"]}, ["wiki", "papers"])


def test_random_orders_come_from_the_seed_and_not_from_the_listing() -> None:
    names = list("abcdefgh")
    order = arrange(names, "random", 1)
    assert sorted(order) == names
    assert arrange(names[::-1], "random", 1) == order
    assert arrange(names, "random", 2) != order
    assert Ordering(order, "random").hash == Ordering(arrange(names, "random", 1), "random").hash
    assert Ordering(order, "random").hash != Ordering(order[::-1], "random").hash


def test_orders_that_need_no_texts() -> None:
    assert arrange(["b", "a"], "listed", 0) == ["b", "a"]
    assert arrange(["b", "a"], "reversed", 0) == ["a", "b"]
    assert arrange(list("abcd"), "reversed_random", 3) == arrange(list("abcd"), "random", 3)[::-1]
    domains = {"b": ["text"], "a": ["text"]}
    assert order_domains(domains, ["a", "b"]).names == ["a", "b"]
    assert order_domains(domains, "reversed_listed").names == ["a", "b"]
    assert order_domains(domains, "published", published={"published": ["a", "c", "b"]}).names == ["a", "b"]
    with pytest.raises(DataError, match="must list each of these exactly once: b, a"):
        order_domains(domains, ["a"])
    with pytest.raises(DataError, match="order=alike is none of"):
        order_domains(domains, "alike")


def test_sizes_are_balanced() -> None:
    sizes = [10, 40, 25, 5]
    assert balanced(sizes, "none") == sizes
    assert balanced(sizes, "min") == [5, 5, 5, 5]
    assert balanced(sizes, "cap=20") == [10, 20, 20, 5]
    for wrong in ("cap", "cap=0", "cap=-1", "max"):
        with pytest.raises(DataError, match="none, min or cap=NUMBER"):
            balanced(sizes, wrong)


def test_a_domain_is_the_mean_of_unit_vectors() -> None:
    """(1, 0) and (3, 4) / 5 give (1.6, 0.8) / 2, as a unit vector (2, 1) / sqrt 5: a long vector weighs no more."""
    table = {"one": [1.0, 0.0], "two": [3.0, 4.0]}
    found = domain_embeddings({"d": ["one", "two", "one"]}, lambda texts: np.array([table[t] for t in texts]), 10)
    assert found["d"] == pytest.approx(np.array([2, 1]) / 5**0.5)
    with pytest.raises(DataError, match="domain empty has no text"):
        domain_embeddings({"empty": ["  "]}, len, 10)


def test_a_sample_does_not_depend_on_the_order_of_texts() -> None:
    texts = [f"text {i}" for i in range(50)]
    assert sorted(sample_pieces(texts, 99)) == sorted(texts)
    assert sample_pieces(texts, 5) == sample_pieces(texts[::-1] + texts, 5)
    assert len(sample_pieces(texts, 5)) == 5


def test_long_texts_are_cut_between_words() -> None:
    text = "word " * 250
    found = list(split_pieces([text, "short", ""]))
    assert [len(piece) for piece in found[:3]] == [499, 499, 249]
    assert " ".join(found[:3]) == text.strip()
    assert found[3:] == ["short"]


def test_texts_give_a_chain_of_similar_domains() -> None:
    """Birds share words only with boats, which share none with the others: a tie. The listed order does not matter."""
    found = order_domains(TEXTS, "similar", encoder="hashed", reference=["a robin in the garden"])
    assert found.names == ["birds", "boats", "metals", "motors"]
    assert found.similarity[1, 2] == found.similarity[1, 3] == 0
    assert found.similarity[0, 1] > 0.1
    assert found.encoder == "hashed (no sentence encoder)"
    mixed = {name: TEXTS[name][::-1] for name in sorted(TEXTS, reverse=True)}
    again = order_domains(mixed, "similar", encoder="hashed", reference=["a robin in the garden"])
    assert again.record() == found.record()


def test_similarities_follow_reversed_and_swapped_orders() -> None:
    found = order_domains(TEXTS, "similar", encoder="hashed")
    back = order_domains(TEXTS, "reversed_similar", encoder="hashed")
    assert back.names == found.names[::-1]
    np.testing.assert_array_equal(back.similarity, found.similarity[::-1, ::-1])
    sources = {"nature": ["birds", "boats"], "technology": ["metals", "motors"]}
    parts = order_domains(
        TEXTS, "similar_hier", encoder="hashed", sources=sources, source_order=["technology", "nature"]
    )
    assert set(parts.names[:2]) == {"metals", "motors"}


def test_orders_without_similarity_read_no_texts() -> None:
    class Unread(dict):
        def __getitem__(self, key: str) -> list[str]:
            raise AssertionError

    found = order_domains(Unread(TEXTS), "random", seed=3)
    assert sorted(found.names) == sorted(TEXTS)
    assert found.record()["similarity"] is None


def test_without_an_encoder_words_are_hashed_unless_one_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModelError("not on this machine")

    monkeypatch.setattr("clpet.models.sentence_encoder.locate", absent)
    assert order_domains(TEXTS, "similar", encoder="auto").encoder == "hashed (no sentence encoder)"
    with pytest.raises(ModelError):
        order_domains(TEXTS, "similar", encoder="minilm")


def test_orders_of_tasks() -> None:
    names = ["a", "b", "c", "d"]
    assert order_tasks(names, "listed", {}, 0) == names
    assert order_tasks(names, "reversed", {}, 0) == names[::-1]
    assert order_tasks(names, ["c", "a", "d", "b"], {}, 0) == ["c", "a", "d", "b"]
    drawn = order_tasks(names, "random", {}, 3)
    assert sorted(drawn) == names
    assert drawn == order_tasks(names, "random", {}, 3)
    assert {tuple(order_tasks(names, "random", {}, seed)) for seed in range(9)} != {tuple(drawn)}


@pytest.mark.parametrize("order", ["nosuch", ["a", "b"], ["a", "b", "c", "c"]])
def test_an_order_that_does_not_fit_is_refused(order) -> None:
    with pytest.raises(DataError, match=r"benchmark\.order"):
        order_tasks(["a", "b", "c"], order, {}, 0)
