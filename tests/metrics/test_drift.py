"""Formulas of drift against numbers computed by hand."""

import math

import pytest
import torch

from clpet.evaluation.probes import Totals
from clpet.metrics.drift import (
    effective_rank,
    hidden_rank,
    kl_divergences,
    linear_cka,
    low_rank_singular_values,
    nll_and_drift,
    stable_rank,
)

BASE = torch.tensor([[2.0, 0, -1], [0, 1, 1], [3, 0, 0]])
NOW = torch.tensor([[1.0, 1, -1], [0, 1, 1], [0, 3, 0]])


def test_divergences_in_both_directions() -> None:
    forward, reverse = kl_divergences(BASE, NOW)
    assert forward.tolist() == pytest.approx([0.318377, 0, 2.592493], abs=1e-6)
    assert reverse.tolist() == pytest.approx([0.411222, 0, 2.592493], abs=1e-6)
    assert [x.mean().item() for x in (forward, reverse)] == pytest.approx([0.970290, 1.001239], abs=1e-6)
    same = kl_divergences(NOW, NOW.clone())
    assert [x.tolist() for x in same] == [[0, 0, 0]] * 2


def test_likelihoods_of_the_next_tokens() -> None:
    after, drift = nll_and_drift(BASE, NOW, torch.tensor([0, 2, 0]))
    assert after.tolist() == pytest.approx([0.758624, 0.861995, 3.094923], abs=1e-6)
    assert (after - drift).tolist() == pytest.approx([0.169846, 0.861995, 0.094923], abs=1e-6)
    assert drift.mean().item() == pytest.approx(1.196259, abs=1e-6)  # above 0: worse than before


def test_means_are_over_tokens_and_not_over_batches() -> None:
    """The last of three tokens is padding: .318377 and 0; then all three, in batches of two and one."""
    few, all_tokens = Totals(), Totals()
    few.add("forward", "reverse", kl_divergences(BASE[:2], NOW[:2]))
    assert few.means() == pytest.approx({"forward": 0.159189, "reverse": 0.205611}, abs=1e-6)
    for rows in (slice(0, 2), slice(2, 3)):
        all_tokens.add("forward", "reverse", kl_divergences(BASE[rows], NOW[rows]))
    assert all_tokens.means() == pytest.approx({"forward": 0.970290, "reverse": 1.001239}, abs=1e-6)


def test_cka_of_small_matrices() -> None:
    X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]])
    assert linear_cka(X, torch.tensor([[1.0, 1], [0, 1], [2, 1], [2, 0]])) == pytest.approx(0.604005, abs=1e-6)
    c, s = math.cos(0.7), math.sin(0.7)
    assert linear_cka(X, 3 * X @ torch.tensor([[c, -s], [s, c]]) + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(X, X * torch.tensor([1.0, 2])) == pytest.approx(0.978899, abs=1e-6)
    assert linear_cka(X, X.clone()) == 1
    assert linear_cka(X, torch.zeros(4, 2)) == 0


def test_cka_is_the_same_from_either_product() -> None:
    """With fewer tokens than dimensions it is computed from n x n matrices."""
    torch.manual_seed(0)
    X, Y = torch.randn(6, 9), torch.randn(6, 9)
    wide = linear_cka(X, Y)
    padded = [torch.cat([Z, Z], 0) for Z in (X, Y)]  # the same centred columns, each row twice: CKA does not change
    assert wide == pytest.approx(linear_cka(*padded), abs=1e-9)


def test_ranks_of_spectra() -> None:
    values = torch.tensor([3.0, 2, 1, 0])
    assert effective_rank(values) == pytest.approx(2.749459, abs=1e-6)
    assert stable_rank(values) == pytest.approx(1.555556, abs=1e-6)
    assert values.norm().item() == pytest.approx(3.741657, abs=1e-6)
    assert (effective_rank(torch.zeros(3)), stable_rank(torch.zeros(3))) == (0, 0)
    H = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 1]])
    assert hidden_rank(H) == pytest.approx(2.507966, abs=1e-6)


def test_the_spectrum_of_an_increment_from_its_factors() -> None:
    A, B = torch.tensor([[1.0, 2, 0], [0, 1, -1]]), torch.tensor([[1.0, 0], [2, 1], [0, -1]])
    values = low_rank_singular_values(A, B, 2)
    assert values.tolist() == pytest.approx([12, 2])
    assert values.square().sum().sqrt().item() == pytest.approx(12.165525, abs=1e-6)
    assert stable_rank(values) == pytest.approx(1.027778, abs=1e-6)
    assert effective_rank(values) == pytest.approx(1.506993, abs=1e-6)
    assert low_rank_singular_values(A, torch.zeros(3, 2), 2).tolist() == [0, 0]
