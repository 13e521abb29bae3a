"""dry_run=true prints what a run would do, and makes a few steps of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from clpet.replay.exemplar_selection import random_features
from clpet.runs.dry_run import rows_of_step
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.runtime.tensor_memory import PeakMemory
from clpet.training.rehearsal import heaviest_tokens
from tests.conftest import tiny_args

STAGED = [
    ("sequential", []),
    ("dynamic_conpet", ["replay.limit=10"]),
    ("crl", ["replay=fixed"]),
    ("crl", ["replay=dynamic", "replay.limit=10"]),
    ("crl", ["replay=all"]),
    ("ea_emr", ["replay=dynamic"]),
    ("ea_emr", ["replay=fixed"]),
    ("joint", []),
]


@pytest.mark.parametrize(("method", "options"), STAGED, ids=str)
def test_announced_steps_equal_those_of_the_run(method: str, options: list[str], make) -> None:
    """Steps of every fit, task by task."""
    run = make(f"method={method}", *options)
    curriculum, replay = run.method.curriculum(), run.method.replay
    announced = {}
    for index, _ in curriculum:
        announced[index] = [plan.steps for plan in run.method.stages(index).values()]
        replay.update_memory(index, random_features)
    replay.setup(run.data, run.config.seed, replay.batch_size)
    done: list[int] = []
    run.trainer.progress.fit = lambda stage, epochs, steps: done.append(steps)
    for index, task in curriculum:
        done.clear()
        run.trainer.begin_task(index)
        run.method.learn(task, index, run.trainer)
        run.method.after_task(task, index)
        assert done == announced[index]


@pytest.mark.parametrize(("method", "options"), STAGED, ids=str)
def test_a_dry_run_makes_few_steps(method: str, options: list[str], make) -> None:
    """No method sends more than the batches of five steps through the network, before or after their backward pass."""
    run = make(f"method={method}", *options, "dry_run=true")
    index, task = run.method.curriculum()[0]
    run.trainer.prepare(PeakMemory(run.method.objective.device))
    run.trainer.begin_task(index)
    run.method.learn(task, index, run.trainer)
    run.trainer.memory.stop()
    cost, stages = run.method.objective.meter.take_learning(), len(run.method.stages(index))
    assert cost["steps"] == 5 * stages
    assert 0 < cost["backward_examples"] <= 5 * stages * 16
    assert cost["forward_examples"] <= 2 * cost["backward_examples"]


def test_the_heaviest_batch_comes_first_and_twice(make) -> None:
    """Then batches whose numbers of padded tokens are at a quarter, a half and three quarters of the order."""
    run = make("method=sequential", "dry_run=true", "train.global_batch_size=4")
    plan = run.method.plan(0)
    few = run.trainer.shortened(plan)
    tokens = [heaviest_tokens(run.method.objective, plan.pool, rows) for rows in few.epoch(0)]
    every = sorted(heaviest_tokens(run.method.objective, plan.pool, rows) for rows in plan.epoch(0))
    assert few.steps == 5
    assert tokens == [every[5], every[5], every[1], every[2], every[4]]


def test_a_plan_without_batches_is_not_shortened(make) -> None:
    run = make("method=sequential", "dry_run=true")
    plan = replace(run.method.plan(0), steps=0, epoch=lambda _: [])
    assert run.trainer.shortened(plan) is plan


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 16), ({"micro_batch_size": 4}, 4), ({"max_tokens": 100}, 3), ({"max_tokens": 10}, 1),
     ({"max_tokens": 100, "micro_batch_size": 2}, 2)],
)  # fmt: skip
def test_texts_of_32_tokens_that_are_computed_at_once(options: dict[str, int], expected: int) -> None:
    assert rows_of_step(16, 32, Hardware(**options)) == expected


def test_ranks_divide_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_world(), "size", 3, raising=False)
    assert rows_of_step(16, 32, Hardware()) == 6


def test_a_dry_run_names_what_is_not_estimated(words: Path, clpet) -> None:
    answer = clpet("train", "method=sequential", *tiny_args(words), "train.epochs=1", "dry_run=true",
                   "evaluation.probes=[weights]")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "without  evaluation.probes: their time and memory are not estimated" in answer.out


@pytest.mark.parametrize(
    ("replay", "steps"), [("replay=fixed", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 10"),
                          ("replay=dynamic", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 6")]
)  # fmt: skip
def test_dry_run_lists_both_stages_of_crl(replay: str, steps: str, words: Path, clpet) -> None:
    """24 examples a task in batches of 16, two epochs; the memory holds 24 a task, dynamic batches 8 new examples."""
    answer = clpet("train", "method=crl", replay, *tiny_args(words), "dry_run=true")
    assert answer.code == 0, answer.err
    assert f"steps    {steps}" in answer.out
