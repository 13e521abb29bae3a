"""Merging: every rule by hand, and a method whose answers have the merged weights while its training has not."""

import pytest
import torch

from clpet.methods.components import task_vectors
from tests.conftest import double, scores

SLOW = [pytest.param(rule, marks=pytest.mark.slow) for rule in ("arithmetic", "dare", "magmax")]
TAUS = [[0.5, -0.2, 0.1, 0, 1, -0.3], [-0.4, -0.6, 0.05, 0.2, 0.2, 0.3], [0.1, 0.3, -0.8, 0.1, -0.9, 0.05]]
VECTORS = [{"a": double([tau[:2]]), "b": double([tau[2:]])} for tau in TAUS]  # rules work across layers


def values(vector: dict) -> list[float]:
    return [round(value, 6) + 0.0 for value in task_vectors.flat(vector).tolist()]


def test_arithmetic_and_magmax_by_hand() -> None:
    scaled = {name: 0.3 * value for name, value in task_vectors.add(VECTORS).items()}
    assert values(scaled) == pytest.approx([0.06, -0.15, -0.195, 0.09, 0.09, 0.015])
    assert values(task_vectors.magmax(VECTORS)) == pytest.approx([0.5, -0.6, -0.8, 0.2, 1, 0.3])
    assert task_vectors.magmax([{"a": double([-0.3])}, {"a": double([0.3])}])["a"].tolist() == [0.3]


@pytest.mark.parametrize(
    ("keep", "mean", "faithful", "expected"),
    [(0.5, False, True, [0.6, -0.8, -0.8, 0.3, 1.2, 0.3]), (0.5, True, True, [0.3, -0.4, -0.8, 0.15, 0.6, 0.3]),
     (0.5, False, False, [0.5, -0.6, -0.8, 0, 1, 0.3]), (0.5, True, False, [0.5, -0.6, -0.8, 0, 1, 0.3]),
     (0.2, True, True, [0.5, -0.6, -0.8, 0, 1, 0])],
)  # fmt: skip
def test_ties_by_hand(keep: float, mean: bool, faithful: bool, expected: list[float]) -> None:
    assert values(task_vectors.ties(VECTORS, keep, mean, faithful)) == pytest.approx(expected)


def test_trimming_keeps_exactly_the_share() -> None:
    """Also where entries are equal: the first ones stay."""
    assert task_vectors.trim({"a": double([1, -1, 1, 0.5])}, 0.5, False)["a"].tolist() == [1, -1, 0, 0]
    assert task_vectors.trim({"a": double([1, -1, 1, 0.5])}, 1, False)["a"].tolist() == [1, -1, 1, 0.5]


def test_dare_by_hand() -> None:
    masks = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[True, False, True, False]])}
    assert values(task_vectors.rescaled(VECTORS[0], masks, 0.5)) == pytest.approx([1, 0, 0.2, 0, 2, 0])


@pytest.mark.parametrize(
    ("alpha", "projected", "total", "scale"),
    [(0.5, [[0.4, 1.2, 0], [-0.8, -0.4, 1], [1, 0, 0]],
      [[1.859791, 1.704809, 0], [0.154983, 2.014774, 0.774913], [0.774913, 0, 0.774913]], 1.290467),
     (0.9, [[0, 0, 0], [0, 0, 1], [1, 0, 0]],
      [[1.649916, 0.824958, 0], [0.824958, 2.474874, 0.824958], [0.824958, 0, 0.824958]], 1.212183)],
)  # fmt: skip
def test_opcm_by_hand(alpha: float, projected: list, total: list, scale: float) -> None:
    merged, new = double([[2, 1, 0], [1, 3, 0], [0, 0, 1]]), double([[1, 2, 0], [0, 1, 1], [1, 0, 1]])
    assert torch.allclose(task_vectors.project(merged, new, alpha), double(projected), atol=1e-6)
    norms = [float(merged.norm()), float(new.norm())]
    after, factor = task_vectors.opcm({"a": merged}, 1.0, norms, {"a": new}, alpha)
    assert torch.allclose(after["a"], double(total), atol=1e-6)
    assert factor == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("rule", ["ties", "opcm", *SLOW])
def test_one_task_gives_its_own_model(rule: str, make) -> None:
    """With a scale of 1 and nothing left out the answers are those of the LoRA that was trained."""
    run = make("method=merge", f"method.rule={rule}", "method.scale=1", "method.keep=1", "method.drop=0")
    run.learn(0)
    rows = run.data.test.rows_of(0)
    answers = scores(run, rows)
    with torch.no_grad(), run.method.stack.selected_branches(None):
        own = run.method.objective.predict(run.data.test.batch(rows), None).scores
    assert torch.allclose(answers, own, atol=1e-4)


@pytest.mark.parametrize("rule", ["opcm", SLOW[-1]])
def test_a_state_restores_the_answers(rule: str, make) -> None:
    """And the weights of training are the same before and after answering."""
    run, fresh = (make("method=merge", f"method.rule={rule}", "train.epochs=1") for _ in range(2))
    for index in range(2):
        run.learn(index)
    rows = run.data.test.rows_of(1)
    before = {name: value.detach().clone() for name, value in run.method.named_parameters().items()}
    answers = scores(run, rows)
    assert all(torch.equal(before[name], value) for name, value in run.method.named_parameters().items())
    fresh.method.load_state_dict(run.method.state_dict())
    assert torch.equal(scores(fresh, rows), answers)
    assert run.method.stack.branches == (1 if rule == "opcm" else 2)


def test_tasks_start_from_the_base_or_from_the_task_before(make) -> None:
    for rule, same in (("arithmetic", False), ("magmax", True)):
        run = make("method=merge", f"method.rule={rule}", "train.epochs=1")
        run.learn(0)
        run.method.add_branch(1)
        for layer in run.method.stack.layers.values():
            (A, B), rank = layer.all(), run.method.stack.rank
            assert torch.equal(A[:rank], A[rank:]) == torch.equal(B[:, :rank], B[:, rank:]) == same
            assert same or (B[:, rank:] == 0).all()


def test_an_exported_model_has_the_merged_weights(make) -> None:
    run = make("method=merge", "method.rule=ties", "train.epochs=1")
    run.learn(0)
    name, increment = next(iter(run.method.merged_increments.tensors.items()))
    before = run.method.stack.layers[name].module.weight.detach().clone()
    run.method.merged()
    assert torch.allclose(run.method.stack.layers[name].module.weight, before + increment, atol=1e-6)
