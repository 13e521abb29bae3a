"""Counts per label and macro-F1, by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from clpet.metrics.label_scores import label_counts, macro_f1


def test_counts_and_f1_by_hand() -> None:
    labels = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "d", "a"]
    counts = label_counts(labels, predictions)
    assert counts == {"a": (3, 3, 2), "b": (2, 2, 1), "c": (1, 0, 0)}
    # F1: a 2·2/(3+3), b 2·1/(2+2), c 0; a prediction of d is wrong and adds no label
    assert macro_f1(counts) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert math.isnan(macro_f1({}))


def test_macro_f1_equals_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 200).tolist(), rng.integers(0, 7, 200).tolist()
    expected = 100 * f1_score(labels, predictions, average="macro", labels=sorted(set(labels)))
    assert macro_f1(label_counts(labels, predictions)) == pytest.approx(expected)
