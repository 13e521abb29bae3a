"""Importance, unit scores and fusion against numbers computed by hand."""

import pytest
import torch
from torch import Tensor

from clpet.methods.components.importance import (
    Importance,
    ParameterGroups,
    above_percentile,
    above_quantile,
    accumulate,
    adaptive,
    flat,
    norm,
    orthogonality,
    static,
    unflat,
)

A1, A2 = [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]], [[0.2, -0.1, 0.3], [0.3, 0.6, -0.5]]
GA1, GA2 = [[1, 2, -1], [-0.5, 0.2, 0.1]], [[0.5, -1, 2], [0.1, -0.3, 0.4]]
B1, B2 = [[1, -1], [0.5, 2]], [[0.9, -1.1], [0.6, 1.8]]
GB1, GB2 = [[0.1, 0.2], [-0.3, 0.05]], [[-0.2, 0.1], [0.4, -0.1]]
NAMES = ("m.lora_A.weight", "m.lora_B.weight")


def t(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(weights: list[float], gradients: list[float], score: str, beta: float = 0.85, **more) -> Importance:
    """Running importance of one weight after some steps in fp64."""
    importance = Importance(1, score, beta, beta, more.pop("skip_first", False), t(0.0))
    for w, g in zip(weights, gradients, strict=True):
        importance.update([t([w])], [t([g])])
    return importance


def lora(score: str) -> dict[str, Tensor]:
    """Importance of the scalars of a LoRA pair with r = 2, d_in = 3, d_out = 2 after two steps."""
    importance = Importance(10, score, 0.85, 0.85, False, t(0.0))
    for weights, gradients in (((A1, B1), (GA1, GB1)), ((A2, B2), (GA2, GB2))):
        importance.update([t(w) for w in weights], [t(g) for g in gradients])
    return unflat(importance.elements(), dict(zip(NAMES, (t(A1), t(B1)), strict=True)))


def unit_scores(elements: dict[str, Tensor], by_rank: bool, how: str = "product_of_means") -> list[float]:
    return ParameterGroups(elements, by_rank).scores(elements, how).tolist()


def approx(values: object, rel: float = 1e-8):
    return pytest.approx(values, rel=rel)


def test_running_score_and_deviation_of_one_weight() -> None:
    mean, deviation, importance = (
        [0.15, 0.2025, 0.472125],
        [0.1275, 0.153, 0.35923125],
        [0.019125, 0.0309825, 0.1696020539],
    )
    for steps in (1, 2, 3):
        running = scalar([2, 2, 2][:steps], [0.5, -0.25, 1][:steps], "first")
        assert running.mean.item() == approx(mean[steps - 1])
        assert running.uncertainty.item() == approx(deviation[steps - 1])
        assert running.elements().item() == approx(importance[steps - 1])


def test_scores_of_second_order() -> None:
    mixed = scalar([2, 2, 2], [0.5, -0.25, 1], "mix")
    assert mixed.mean.item() == approx(0.133875)
    assert mixed.uncertainty.item() == approx(0.125746875)
    assert mixed.elements().item() == approx(0.01683436289)
    assert scalar([2, 2, 2], [0.5, -0.25, 1], "second").elements().item() == approx(0.4381678547)
    assert [scalar([2], [g], "mix", 0).mean.item() for g in (0.5, -0.25, 1)] == [0.5, 0.625, 0]


@pytest.mark.parametrize(
    ("score", "matrices", "ranks"),
    [
        ("first", [0.003353862, 0.001574405859], [1.04874161e-05, 1.337187918e-06]),
        ("mix", [0.002877466092, 0.001626635528], [8.113076676e-06, 1.750471314e-06]),
        ("second", [0.0006746693138, 5.115606996e-05], [9.128690029e-08, 1.013928053e-09]),
    ],
)
def test_unit_scores_of_a_lora_pair(score: str, matrices: list[float], ranks: list[float]) -> None:
    assert unit_scores(lora(score), by_rank=False) == approx(matrices, rel=1e-7)
    assert unit_scores(lora(score), by_rank=True) == approx(ranks, rel=1e-7)


@pytest.mark.parametrize(
    ("score", "ranks"), [("first", [0.004147208438, 0.00113695065]), ("mix", [0.003452481088, 0.001301786645])]
)
def test_unit_scores_as_one_mean(score: str, ranks: list[float]) -> None:
    assert unit_scores(lora(score), True, "mean_of_concat") == approx(ranks, rel=1e-7)


@pytest.mark.parametrize(("skip", "counted"), [(True, 3), (False, 4)])
def test_the_first_step_is_skipped_on_request(skip: bool, counted: int) -> None:
    assert scalar([2] * 4, [1] * 4, "first", skip_first=skip).counted.item() == counted
    assert scalar([2], [1], "first", skip_first=True).mean.item() == 0


def test_units_of_two_tasks() -> None:
    new, old = norm(t([1, 3, 11, 6, 2])), norm(t([5, 5.5, 10, 0, 1]))
    assert new.tolist() == approx([0, 0.2, 1, 0.5, 0.1])
    assert old.tolist() == approx([0.5, 0.55, 1, 0, 0.1])
    assert torch.quantile(new, 0.8).item() == approx(0.6)
    assert torch.quantile(old, 0.8).item() == approx(0.64)
    expected = [0.27777778, 0.38333333, 1, 0.05555556, 0]
    assert accumulate(old, new, 0.7).tolist() == pytest.approx(expected, abs=1e-8)


OLD, NEW = t([10, 20, 30, 40, 50]), t([0, 10, 20, 30, 40])
P, C = t([0.5, 0.55, 1, 0, 0.1]), t([0, 0.2, 1, 0.5, 0.1])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, 0.019125), (2, 0.060148125), (3, 0.106638969), (10, 0.237172310), (60, 0.000524026)],
)
def test_a_steady_weight_rises_and_fades(steps: int, expected: float) -> None:
    """S_t = (1 - b^t) (1 - b) t b^t."""
    importance = scalar([1] * steps, [1] * steps, "first").elements().item()
    assert importance == pytest.approx(expected, abs=2e-9)
    assert importance == approx((1 - 0.85**steps) * 0.15 * steps * 0.85**steps)


RULES = [
    lambda p, c: adaptive(p, c, 0.25),
    lambda p, c: static(above_percentile(p, 80), above_percentile(c, 80), 0.7),
    lambda p, c: torch.full_like(p, 0.5),
]


@pytest.mark.parametrize("rule", RULES)
def test_units_are_judged_by_their_order_of_size_alone(rule) -> None:
    """Shifting or scaling all scores of one task changes nothing; permuting units permutes the result."""
    torch.manual_seed(0)
    old, new = torch.rand(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    weight = rule(norm(old), norm(new))
    torch.testing.assert_close(rule(norm(old * 7 + 3), norm(new)), weight)
    torch.testing.assert_close(rule(norm(old), norm(new * 1e-9)), weight)
    order = torch.randperm(40)
    torch.testing.assert_close(rule(norm(old[order]), norm(new[order])), weight[order])
    torch.testing.assert_close(accumulate(old[order], new[order], 0.7), accumulate(old, new, 0.7)[order])


@pytest.mark.parametrize(
    ("units", "expected"), [(5, 1), (10, 2), (20, 4), (144, 29), (288, 58), (512, 103), (576, 115), (1152, 231)]
)
def test_how_many_units_are_important(units: int, expected: int) -> None:
    """n - 1 - floor(0.8 (n - 1)) of n distinct scores, by interpolation as well as by selection."""
    torch.manual_seed(0)
    scores = torch.rand(units, dtype=torch.float64)
    assert above_percentile(scores, 80).sum() == above_quantile(scores, 0.8).sum() == expected


def test_ties_leave_fewer_important() -> None:
    for scores, expected in (([0, 0, 0, 1, 1], 0), ([0, 0, 0, 0, 1], 1)):
        assert above_percentile(t(scores), 80).sum() == above_quantile(t(scores), 0.8).sum() == expected
    assert above_percentile(t([0, 0, 0, 1, 1]), 80, strict=False).sum() == 2


def test_without_memory_and_when_steady_nothing_is_important() -> None:
    assert scalar([2, 3], [0.5, 4], "first", beta=0).elements().item() == 0
    steady = scalar([1] * 400, [1] * 400, "first")
    assert steady.mean.item() == approx(1)
    assert steady.elements().item() < 1e-12


@pytest.mark.parametrize("score", ["first", "second", "mix"])
def test_without_gradient_or_weight_importance_is_zero(score: str) -> None:
    assert scalar([2, 3], [0, 0], score).elements().item() == 0
    assert scalar([0, 0], [2, 3], score).elements().item() == 0


def test_twice_the_loss() -> None:
    """With first-order scores s doubles, I U is fourfold and a rank's score sixteenfold."""
    torch.manual_seed(0)
    weights = [[torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)] for _ in range(5)]
    gradients = [[torch.randn_like(w) for w in pair] for pair in weights]

    def ranks(scale: float, score: str) -> tuple[Tensor, Tensor]:
        importance = Importance(14, score, 0.85, 0.85, False, t(0.0))
        for pair, grads in zip(weights, gradients, strict=True):
            importance.update(pair, [scale * g for g in grads])
        elements = unflat(importance.elements(), dict(zip(NAMES, weights[0], strict=True)))
        return importance.elements(), ParameterGroups(elements, True).scores(elements)

    (once, one), (twice, two) = ranks(1, "first"), ranks(2, "first")
    torch.testing.assert_close(twice, 4 * once)
    torch.testing.assert_close(two, 16 * one)
    assert not torch.allclose(ranks(2, "mix")[0], 4 * ranks(1, "mix")[0])


def test_product_of_means_is_the_mean_of_the_outer_product() -> None:
    torch.manual_seed(0)
    elements = dict(zip(NAMES, (torch.rand(4, 30).double(), torch.rand(20, 4).double()), strict=True))
    a, b = elements.values()
    outer = torch.stack([torch.outer(b[:, rank], a[rank]).mean() for rank in range(4)])
    torch.testing.assert_close(ParameterGroups(elements, True).scores(elements), outer, rtol=1e-12, atol=0)


def test_tiny_scores_do_not_underflow() -> None:
    """1e-21 times 1e-25 is 0 in fp32."""
    importance = Importance(2, "first", 0.85, 0.85, False)
    importance.mean.fill_(1e-21)
    importance.uncertainty.copy_(torch.tensor([1e-25, 1e-25]))
    elements = unflat(importance.elements(), dict(zip(NAMES, (torch.zeros(1, 1), torch.zeros(1, 1)), strict=True)))
    assert ParameterGroups(elements, True).scores(elements).item() == pytest.approx(1e-92, rel=1e-5)
    assert (importance.mean * importance.uncertainty).sum() == 0


def test_equal_scores_have_importance_zero() -> None:
    flat_map = norm(t([3, 3, 3, 3, 3]))
    assert flat_map.tolist() == [0] * 5
    assert adaptive(flat_map, flat_map, 0.25).tolist() == [0.5] * 5
    assert not above_percentile(flat_map, 80).any()
    assert static(above_percentile(flat_map, 80), above_percentile(C, 80), 0.7).tolist() == [0.5, 0.5, 1, 0.5, 0.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", ["first", "second", "mix"])
def test_a_step_that_is_not_finite_is_skipped(bad: float, score: str) -> None:
    """With one NaN or infinite gradient no score of the step counts, not even that of a weight of 0."""
    torch.manual_seed(0)
    weights = [torch.randn(2, 3), torch.zeros(4)]
    good = [torch.randn(2, 3), torch.randn(4)]
    clean, dirty = (Importance(10, score, 0.85, 0.85, False) for _ in range(2))
    for step in range(3):
        clean.update(weights, good)
        dirty.update(weights, good)
        if step == 1:
            dirty.update(weights, [good[0], torch.tensor([0, bad, 0, 0])])
    assert torch.equal(clean.mean, dirty.mean)
    assert torch.equal(clean.uncertainty, dirty.uncertainty)
    assert (dirty.counted.item(), dirty.skipped.item()) == (3, 1)


def test_importance_resumes_from_its_state() -> None:
    torch.manual_seed(0)
    series = [([torch.randn(6)], [torch.randn(6)]) for _ in range(6)]
    uninterrupted, cut = (Importance(6, "mix", 0.85, 0.85, True) for _ in range(2))
    for step, (weights, gradients) in enumerate(series):
        uninterrupted.update(weights, gradients)
        cut.update(weights, gradients)
        if step == 2:
            uninterrupted.keep_best(0.5)
            cut.keep_best(0.5)
            state, cut = cut.state(), Importance(6, "mix", 0.85, 0.85, True)
            cut.load(state)
    assert torch.equal(uninterrupted.elements(), cut.elements())
    assert (cut.counted.item(), cut.steps) == (5, 6)
    cut.keep_best(0.4)  # no better than 0.5
    uninterrupted.restore_best()
    cut.restore_best()
    assert torch.equal(uninterrupted.elements(), cut.elements())
    assert cut.counted.item() == 2


def test_flat_and_back() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(2.0)}
    back = unflat(flat(tensors.values()), tensors)
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    """Updates, quantiles and the orthogonality term never synchronise with the GPU."""
    tensors = [torch.randn(8, 64, device="cuda", requires_grad=True) for _ in range(4)]
    grads = [torch.randn_like(value) for value in tensors]
    importance = Importance(4 * 8 * 64, "mix", 0.85, 0.85, False, torch.zeros((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            importance.update(list(tensors), grads)
        orthogonality(tensors).backward()
        above_quantile(importance.elements(), 0.8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert importance.counted.item() == 3
