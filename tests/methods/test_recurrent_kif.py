"""Recurrent-KIF: the order of inner and outer steps, the fusion at the end of a round, and skipped steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clpet.methods.recurrent_kif import RecurrentKIF, alternate, fused_step
from clpet.replay.batch_plan import BatchPlan
from tests.methods.test_kif import equal, weights


@pytest.mark.parametrize(
    ("how", "expected"),
    [("code", {(1, 1): 0.28, (0, 0): 0.4, (1, 0): 1, (0, 1): -0.2}), ("paper", {(1, 1): 0.8, (0, 0): 0, (1, 0): 1, (0, 1): -0.2})],
)  # fmt: skip
def test_fusion_of_a_round(how: str, expected: dict[tuple[int, int], float]) -> None:
    inner, outer = torch.tensor([1.0] * 4), torch.tensor([-0.2] * 4)
    masks = torch.tensor(list(expected), dtype=torch.bool)
    step = fused_step(inner, outer, masks[:, 0], masks[:, 1], how)
    assert step.tolist() == pytest.approx(list(expected.values()))


def batches(*numbers: int) -> BatchPlan:
    """A plan whose epochs have one batch per number, marked with the epoch."""
    return BatchPlan(None, len(numbers), lambda epoch: [np.array([number + 100 * epoch]) for number in numbers])


def test_inner_and_outer_batches_take_turns_across_epochs() -> None:
    """3 new and 2 old batches per epoch, Q = 2, M = 1: a round may continue in the next epoch."""
    plan = alternate(batches(0, 1, 2), batches(50, 51), 2, 1)
    assert plan.steps == 5  # 3 and half of it, rounded up
    stream = [int(rows[0]) for epoch in range(3) for rows in plan.epoch(epoch)]
    assert stream == [0, 1, 50, 2, 100, 51, 101, 102, 150, 200, 201, 151, 202, 300, 250]
    assert [int(rows[0]) for rows in plan.epoch(1)] == stream[5:10]


def one_round(skipped: tuple[int, ...] = (), **options: float) -> tuple[RecurrentKIF, list[list[float]], list[Tensor]]:
    """Runs two inner steps of .5 and an outer one of .1 on five weights of 1; returns weights and gradients per step."""
    method = RecurrentKIF(inner_steps=2, outer_steps=1, **options)
    weight = nn.Parameter(torch.ones(5))
    method.objective = SimpleNamespace(device="cpu", adapters=SimpleNamespace(tensors=lambda name: {"w": weight}))
    method.replay = SimpleNamespace(memory={0: [1]})
    inner, outer = torch.tensor([9.0, 1, 2, 3, 4]), torch.tensor([1.0, 9, 2, 3, 4])
    seen, used = [], []

    class Steps:
        def fit(self, plan, parameters, hooks) -> None:
            for number, (gradient, size) in enumerate(((inner, 0.5), (inner, 0.5), (outer, 0.1))):
                weight.grad = gradient.clone()
                hooks.adjust_gradients(None)
                used.append(weight.grad)
                if number not in skipped:
                    with torch.no_grad():
                        weight.add_(size)
                    hooks.after_step(None)
                weight.grad = None
                hooks.end_step(None)
                seen.append(weight.tolist())

    method.plan = lambda index: None
    method.named_parameters = lambda: {"w": weight}
    method.fit(Steps(), 1)
    assert torch.equal(method.start, weight.detach())
    return method, seen, used


def test_a_round_of_two_inner_steps_and_one_outer_step() -> None:
    """Of five weights one is important in the inner steps and another in the outer one; then a new round starts."""
    method, seen, used = one_round()
    assert seen[1] == pytest.approx([2.0] * 5)
    assert seen[2] == pytest.approx([2.0, 1.1, 1.55, 1.55, 1.55])
    assert method.inner.mean.max() == 0
    assert method.outer.mean.max() > 0
    assert method.diagnostics() == {"fusions": 1.0, "skipped_steps": 0.0, "skipped_outer_steps": 0.0}
    weighted = one_round(outer_weight=0.25)[2]
    assert [(a / b).tolist() for a, b in zip(weighted, used, strict=True)] == [[1.0] * 5] * 2 + [[0.25] * 5]


@pytest.mark.parametrize(
    ("skipped", "end", "outer"),
    [
        (1, [1.5, 1.1, 1.3, 1.3, 1.3], 0),  # t_in = .5, t_out = .1, masks as in the whole round
        (2, [2.0, 1.5, 1.5, 1.5, 1.5], 1),  # t_in = 1, t_out = 0 and nothing important in it
    ],
)
def test_a_skipped_last_step_of_a_round_loses_neither_middle_nor_fusion(
    skipped: int, end: list[float], outer: int
) -> None:
    method, seen, _ = one_round((skipped,))
    assert seen[2] == pytest.approx(end)
    assert method.diagnostics() == {"fusions": 1.0, "skipped_steps": 1.0, "skipped_outer_steps": float(outer)}


def test_the_first_task_of_recurrent_kif_is_that_of_sequential_training(make) -> None:
    run, plain = make("method=recurrent_kif"), make("method=sequential")
    run.learn(0)
    plain.learn(0)
    assert equal(weights(run), weights(plain))


def test_recurrent_kif_fuses_as_often_as_rounds_are_full(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 batches of new data per epoch and 6 epochs are 6 * (2 + 2 * 1 / 2) = 18 steps in rounds of 3.

    The learning rate falls over the 12 inner steps; an outer step uses that of the next inner step.
    """
    taken: list[float] = []
    step = torch.optim.AdamW.step
    run = make("method=recurrent_kif", "train.epochs=6", "method.inner_steps=2", "method.outer_steps=1",
               "train.schedule=linear", "train.lr=1.2e-2")  # fmt: skip
    run.learn(0)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(self.param_groups[0]["lr"]) or step(self))
    run.learn(1)
    assert run.method.diagnostics()["fusions"] == 6
    assert run.method.replay.stored() == 2
    assert taken == pytest.approx([1e-3 * (12 - i) for turn in range(0, 12, 2) for i in (turn, turn + 1, turn + 2)])
    assert run.trainer.stage_history[""]["steps"] == 12 + 12


def test_a_nan_step_of_recurrent_kif_is_skipped_and_counted(make) -> None:
    """on_nan=skip skips the last inner and the only outer step of the first round; both rounds are fused."""
    run = make("method=recurrent_kif", "method.inner_steps=2", "method.outer_steps=1", "train.on_nan=skip")
    run.learn(0)
    loss, calls = run.method.loss, iter(range(100))
    run.method.loss = lambda batch: loss(batch) * (float("nan") if next(calls) in (1, 2) else 1)
    run.learn(1)  # 2 epochs of 3 steps
    assert run.method.diagnostics() == {"fusions": 2.0, "skipped_steps": 2.0, "skipped_outer_steps": 1.0}
    assert run.method.objective.meter.take_learning()["skipped_steps"] == 2
