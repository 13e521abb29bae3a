"""Samples, held-out splits, and tasks as groups of labels."""

import pytest

from clpet.data.benchmark import Example
from clpet.data.splits import by_label, sample, split_off
from clpet.errors import DataError


def test_a_sample_is_balanced_over_labels_and_deterministic() -> None:
    examples = [Example(str(i), "ab"[i % 2] if i < 20 else "c") for i in range(23)]
    chosen = sample(examples, 6)
    assert sorted(e.target for e in chosen) == ["a", "a", "b", "b", "c", "c"]
    assert chosen == sample(examples, 6)


def test_a_split_never_takes_the_last_example_of_a_label() -> None:
    examples = [Example("x", "rare")] + [Example(str(i), "often") for i in range(30)]
    rest, part = split_off(examples, 0.2)
    assert {e.target for e in rest} == {"rare", "often"}
    assert len(part) == 6


def test_a_partition_must_cover_the_labels() -> None:
    examples = {"train": [Example("x", "a"), Example("y", "b")]}
    with pytest.raises(DataError, match="does not cover"):
        by_label(examples, {"t": ["a"]})
    with pytest.raises(DataError, match="lacks"):
        by_label(examples, {"t": ["a", "b", "c"]})
    with pytest.raises(DataError, match="two tasks"):
        by_label(examples, {"t": ["a", "b"], "u": ["b"]})
