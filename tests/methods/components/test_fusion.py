"""Fusion of old and new weights, and the orthogonality term, against numbers computed by hand."""

import math

import pytest
import torch

from clpet.methods.components.importance import (
    ParameterGroups,
    above_percentile,
    adaptive,
    fuse,
    norm,
    orthogonality,
    static,
)
from tests.methods.components.test_importance import A1, A2, B1, B2, NAMES, NEW, OLD, RULES, C, P, approx, lora, t


def test_static_fusion() -> None:
    by_percentile = static(above_percentile(P, 80), above_percentile(C, 80), 0.7)
    assert fuse(OLD, NEW, by_percentile).tolist() == approx([5, 15, 27, 35, 45])
    by_threshold = static(P > 0.45, C > 0.45, 0.7)
    assert fuse(OLD, NEW, by_threshold).tolist() == approx([10, 20, 27, 30, 45])


def test_adaptive_fusion() -> None:
    weight = adaptive(P, C, 0.25)
    assert weight.tolist() == approx([0.119202922, 0.1978161114, 0.5, 0.880797078, 0.5])
    assert fuse(OLD, NEW, weight).tolist() == approx([8.80797078, 18.02183889, 25, 31.19202922, 45])
    sharper = fuse(OLD, NEW, adaptive(P, C, 0.15))
    assert sharper.tolist() == approx([9.6555480433, 19.1160032279, 25, 30.3444519567, 45])


def test_orthogonality() -> None:
    a, b = t(A1), t(B1)
    assert orthogonality([a]).item() == approx(0.9527329111)
    assert orthogonality([b.mT]).item() == approx(4.0078048855)
    assert 0.1 * orthogonality([a, b.mT]).item() == approx(0.2480268898)
    assert 0.1 * orthogonality([a, b.mT], squared=True).item() == pytest.approx(0.84851, abs=1e-5)
    assert orthogonality([torch.zeros(8, 12)]).item() == approx(2.8284271247, rel=1e-6)


@pytest.mark.parametrize("width", [64, 768])
def test_orthogonality_at_initialisation(width: int) -> None:
    """Rows of a Kaiming A have squared norm 1/3 on average and B is zero: lambda sqrt(8) 5/6."""
    torch.manual_seed(0)
    factors = []
    for _ in range(100):
        a = torch.empty(8, width)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        factors += [a, torch.zeros(8, width)]
    expected = 0.1 * math.sqrt(8) * (math.sqrt(8 * (2 / 3) ** 2) / math.sqrt(8) + 1) / 2
    assert expected == pytest.approx(0.2357, abs=1e-4)
    assert 0.1 * orthogonality(factors).item() == pytest.approx(0.2357, rel=0.05 if width < 100 else 0.01)


def test_orthogonal_rows_and_zero_columns_get_no_gradient() -> None:
    for start in (torch.eye(2, 3), torch.zeros(2, 3)):
        factor = start.clone().requires_grad_()
        orthogonality([factor]).backward()
        assert torch.equal(factor.grad, torch.zeros(2, 3))


def test_fusion_from_end_to_end() -> None:
    """A2 and B2 were trained from A1 and B1; the first rank matters to the new task, the second to the old ones."""
    units = ParameterGroups(dict(zip(NAMES, (t(A1), t(B1)), strict=True)), by_rank=True)
    new = norm(units.scores(lora("mix")))
    assert new.tolist() == [1, 0]
    weight = adaptive(t([0, 1]), new, 0.25)
    assert weight.tolist() == approx([0.98201379, 0.01798621], rel=1e-6)
    w = units.broadcast(weight)
    a = fuse(t(A1), t(A2), w[NAMES[0]])
    b = fuse(t(B1), t(B2), w[NAMES[1]])
    torch.testing.assert_close(
        a, t([[0.19820138, -0.10179862, 0.3], [0.39820138, 0.50179862, -0.59820138]]), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(b, t([[0.90179862, -1.00179862], [0.59820138, 1.99640276]]), atol=1e-8, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_fusion_lies_between_old_and_new(rule) -> None:
    torch.manual_seed(0)
    p, c = norm(torch.rand(50, dtype=torch.float64)), norm(torch.rand(50, dtype=torch.float64))
    old, new = torch.randn(50), torch.randn(50)
    fused = fuse(old, new, rule(p, c))
    assert (fused >= torch.minimum(old, new)).all()
    assert (fused <= torch.maximum(old, new)).all()
    assert torch.equal(fuse(old, old, rule(p, c)), old)


def test_temperature_between_halves_and_winner_takes_all() -> None:
    torch.testing.assert_close(adaptive(P, C, 1e12), torch.full_like(P, 0.5))
    assert adaptive(P, C, 1e-300).tolist() == [0, 0, 0.5, 1, 0.5]
    torch.testing.assert_close(adaptive(P, C, 0.25) + adaptive(C, P, 0.25), torch.ones_like(P))
    edge = adaptive(t([1, 0]), t([0, 1]), 0.25).tolist()
    assert edge == pytest.approx([0.0180, 0.9820], abs=1e-4)


def test_grown_rows_keep_their_new_values() -> None:
    fused = fuse(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [9.0]]), torch.tensor(0.5))
    assert fused.tolist() == [[2], [3], [9]]


def test_fusion_is_exact_in_low_precision_too() -> None:
    """bf16 weights are fused in fp32: 1 + 0.3 * 0.0078125 rounds once, to 1."""
    old, new = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert fuse(old, new, t([0.3])).dtype is torch.bfloat16
    assert fuse(old, new, t([0.3])).item() == 1.0
    assert fuse(old, new, t([0.7])).item() == 1.0078125
