"""MbPA++: adaptation by hand, weights that come back bit for bit, keys of the memory, and sparse replay."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clpet.errors import ConfigError
from clpet.methods.mbpa import adapt, interleaved
from clpet.objectives.base import AnswerSpace
from tests.conftest import double, scores, set_up, tiny_args

CHEAP = ["method=mbpa", "method.steps=2", "method.neighbours=4", "train.epochs=1"]


@pytest.fixture(scope="module")
def run(words: Path) -> SimpleNamespace:
    """After two tasks, with a memory in which later examples replace earlier ones."""
    options = ["replay=reservoir", "replay.capacity=10", "method.replay_rate=0.5", "train.global_batch_size=8"]
    run = set_up(tiny_args(words, "cache_dir=null", *CHEAP, *options))
    assert run.method.plan(0).steps == 3  # nothing is stored yet
    run.learn(0)
    run.learn(1)
    return run


def test_restrained_adaptation_by_hand() -> None:
    """Three steps of plain SGD on one neighbour of class 0."""
    weight, x = nn.Parameter(double([[0.2, -0.1], [0, 0.3]])), double([[1, 2]])

    def backward() -> None:
        F.cross_entropy(F.linear(x, weight), torch.tensor([0])).backward()

    adapt([weight], backward, torch.optim.SGD([weight], lr=0.1), steps=3, restraint=1e-3)
    expected = [[0.350345, 0.200689], [-0.150345, -0.000689]]
    assert torch.allclose(weight.detach(), double(expected), atol=1e-6)


def test_an_answer_is_that_of_the_adapted_weights_which_are_then_undone(run) -> None:
    """No tensor changes by an evaluation, and an example's answer does not depend on others."""
    method, rows = run.method, run.data.test.rows_of(0)[:2]
    model = method.objective.adapters.model
    before = {
        name: value.detach().clone() for name, value in {**model.state_dict(), **method.named_parameters()}.items()
    }
    together = scores(run, rows)
    after = {**model.state_dict(), **method.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert torch.allclose(scores(run, rows[1:]), together[1:], atol=1e-5)
    with torch.inference_mode(), method.adapted(method.nearest(run.data.test.batch(rows[:1]))[0]):
        adapted = method.objective.predict(run.data.test.batch(rows[:1]), AnswerSpace(range(12))).scores
    assert torch.allclose(adapted, together[:1], atol=1e-5)
    method.steps = 0
    assert not torch.allclose(scores(run, rows), together, atol=1e-3)
    method.steps = 2


def test_keys_are_those_of_the_bare_backbone_in_the_order_of_the_memory(run) -> None:
    method, pool = run.method, run.data.train
    rows = method.replay.memory_rows()
    assert set(pool.tasks[rows]) == {0, 1}
    with method.objective.adapters.off(), torch.no_grad():
        expected = method.objective.features(pool.batch(rows))
    assert torch.allclose(method.keys, expected, atol=1e-5)
    nearest = method.nearest(pool.batch(rows[:1]))[0]
    assert nearest[0] == rows[0]
    assert len(nearest) == 4


def test_sparse_replay_by_hand(run) -> None:
    assert interleaved([1, 2, 3, 4, 5], [10, 20]) == [1, 2, 3, 10, 4, 5, 20]
    assert interleaved([1, 2], []) == [1, 2]
    plan = run.method.plan(2)
    tasks = [set(run.data.train.tasks[rows].tolist()) for rows in plan.epoch(0)]
    assert tasks == [{2}, {2}, {0, 1}, {2}, {0, 1}]
    assert plan.steps == 5
    assert all(np.array_equal(*pair) for pair in zip(plan.epoch(0), run.method.plan(2).epoch(0), strict=True))


@pytest.mark.slow
def test_the_best_epoch_is_chosen_without_adaptation(make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(*CHEAP, "train.select=best")
    run.learn(0)
    monkeypatch.setattr(run.method, "adapted", None)  # calling it would fail
    run.learn(1)


@pytest.mark.parametrize(
    ("word", "message"), [("peft=none", "which peft=none trains"), ("replay=none", "needs a memory")]
)
def test_refusals(word: str, message: str, make) -> None:
    with pytest.raises(ConfigError, match=message):
        make("method=mbpa", word)
