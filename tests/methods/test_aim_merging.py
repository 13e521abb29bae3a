"""AIMMerging: the control of its rounds by hand-computed numbers, and rounds inside a fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clpet.data.micro_batches import MicroBatchLimits
from clpet.methods.aim_merging import AIMMerging, Control
from clpet.methods.components.memory_gradient import memory_loss
from clpet.training.step import StepHooks
from tests.methods.test_kif import equal, weights

# Rounds of 3 inner steps and 2 outer ones: two losses are collected, and the third is always high.
SHORT = ("method=aim_merging", "method.interval=2", "method.longest=2", "method.alarm=0.01")


@pytest.mark.parametrize(
    ("interval", "change", "before", "expected"),
    [(8, 3, 2, 5), (8, 1, 2, 24), (70, 1, 2, 128), (100, 2, 2, 50), (3, 9, 2, 2), (70, 2.1, 2, 33),
     (8, 0, 2, 128), (8, 1, 0, 8), (8, 0, 0, 8)],
)  # fmt: skip
def test_the_next_interval(interval: int, change: float, before: float, expected: int) -> None:
    assert Control(interval).next_interval(change, before) == expected


@pytest.mark.parametrize(
    ("alarms", "interval", "expected"), [(1, 8, 0.52), (3, 8, 0.4), (3, 100, 0.28), (1, 100, 0.4), (2, 70, 0.4)]
)
def test_the_fusion_of_a_round(alarms: int, interval: int, expected: float) -> None:
    """Changes of 1 by the inner and of -.2 by the outer steps."""
    method = AIMMerging()
    method.control, method.live = Control(interval, alarms=alarms), {"w": torch.zeros(1)}
    assert method.fused(torch.ones(1), torch.tensor([-0.2])).item() == pytest.approx(expected)


def rounds(losses: list[float], change: float = 1.0, **options: float) -> tuple[Control, list[int]]:
    """Passes losses to a control; returns it and the inner steps after which a round ended."""
    control, ends = Control(**options), []
    for loss in losses:
        if control.inner_steps_are_over(loss):
            ends.append(control.step)
            control.start_round(change)
    return control, ends


def test_six_losses_of_a_round_of_eight_are_collected() -> None:
    """A high loss among them raises no alarm; later ones do from twice their mean, 2 (1 + .. + 6) / 6 = 7."""
    assert rounds([9.0] * 6)[0].losses == [9.0] * 6
    control, ends = rounds([1, 2, 3, 4, 5, 6, 6.9, 7])
    assert (ends, control.step) == ([8], 8)
    assert rounds([1, 2, 3, 4, 5, 6, 6.9, 6.9, 6.9])[1] == []


@pytest.mark.parametrize(
    ("late", "end"), [([9, 1, 1], 8), ([1, 1, 1, 9], 10), ([9, 9, 9], 8), ([1] * 20, 16), ([float("nan")] * 20, 16)]
)
def test_when_a_round_ends(late: list[float], end: int) -> None:
    """At the planned point after an alarm, at an alarm after it, or at twice the interval."""
    assert rounds([1.0] * 6 + late)[1][:1] == [end]


def test_three_alarms_end_a_round_before_its_planned_point() -> None:
    """Of 20 steps, 14 are collected and the next three are high."""
    assert rounds([1.0] * 14 + [9.0] * 3, interval=20)[1] == [17]


def test_the_interval_changes_after_four_rounds() -> None:
    """Every round ends at twice its interval. The fifth changes the weights half as much per step: Q = 8 (2 + 1)."""
    control, ends = rounds([1.0] * 64, change=16.0)
    assert ends == [16, 32, 48, 64]
    assert (control.interval, control.due, control.changes) == (8, 72, [2.0] * 4)
    for _ in range(16):
        control.inner_steps_are_over(1.0)
    control.start_round(8.0)
    assert (control.interval, control.due) == (24, 104)


def traced(run: SimpleNamespace, index: int) -> list[tuple[bool, list[int]]]:
    """Learns a task; returns of every step whether it was on the memory, and its rows."""
    steps, hooks = [], run.method.hooks

    def noting(index: int) -> StepHooks:
        own = hooks(index)

        def end_step(context) -> None:
            steps.append((run.method.in_outer_loop, context.rows.tolist()))
            hooks(index).end_step(context)

        own.end_step = end_step
        return own

    run.method.hooks = noting
    run.learn(index)
    return steps


def test_outer_steps_come_between_the_batches_of_the_plan(make) -> None:
    """6 batches of 4 new examples in each of 2 epochs: four rounds, each of 3 inner and 2 outer steps.

    The first task is that of sequential training.
    """
    common = "train.global_batch_size=4", "train.schedule=linear", "model.dropout=0.3"
    run, plain = make(*SHORT, "replay=all", *common), make("method=sequential", *common)
    run.learn(0)
    plain.learn(0)
    assert equal(weights(run), weights(plain))
    plan, memory = run.method.plan(1), run.method.replay.memory_rows()
    lines = []
    run.trainer.step_log.every = 1
    run.trainer.step_log.subscribe(lines.extend)
    steps = traced(run, 1)
    assert [outer for outer, _ in steps] == [False, False, False, True, True] * 4
    assert [rows for outer, rows in steps if not outer] == [rows.tolist() for e in range(2) for rows in plan.epoch(e)]
    assert all(set(rows) <= set(memory) for outer, rows in steps if outer)
    assert run.method.diagnostics() == {
        "fusions": 4.0, "skipped_steps": 0.0, "skipped_outer_steps": 0.0, "outer_steps": 8.0, "last_interval": 2.0
    }  # fmt: skip
    assert len(lines) == 20
    falling = [line["lr"] / lines[0]["lr"] for line in lines]
    inner_done = [min(i % 5, 3) + 3 * (i // 5) for i in range(20)]
    assert falling == pytest.approx([1 - done / 12 for done in inner_done])

    check_memory_loss(run)


def check_memory_loss(run: SimpleNamespace) -> None:
    """It does not depend on micro-batches, has no dropout and draws nothing from torch's generator."""
    objective, rows, before = run.method.objective, np.arange(12), torch.get_rng_state()
    one = memory_loss(run.method, rows)
    objective.micro_batches = MicroBatchLimits(5)
    several = memory_loss(run.method, rows)
    assert torch.equal(before, torch.get_rng_state())
    objective.adapters.train_mode(False)
    with torch.no_grad():
        loss = objective.loss(run.data.train.batch(rows, objective.device)).item()
    assert [one, several] == pytest.approx([loss] * 2, rel=1e-5)
