"""dry_run=true prints what a run would do, and does one step of it."""

from pathlib import Path

import pytest

from clpet.replay.exemplar_selection import random_features
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
def test_a_dry_run_is_one_step(method: str, options: list[str], make) -> None:
    """No method sends more than the first batch through the network, before or after its backward pass."""
    run = make(f"method={method}", *options, "dry_run=true")
    index, task = run.method.curriculum()[0]
    run.trainer.begin_task(index)
    run.method.learn(task, index, run.trainer)
    cost = run.method.objective.meter.take_learning()
    assert 0 < cost["backward_examples"] <= 16
    assert cost["forward_examples"] <= 2 * cost["backward_examples"]


@pytest.mark.parametrize(
    ("replay", "steps"), [("replay=fixed", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 10"),
                          ("replay=dynamic", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 6")]
)  # fmt: skip
def test_dry_run_lists_both_stages_of_crl(replay: str, steps: str, words: Path, clpet) -> None:
    """24 examples a task in batches of 16, two epochs; the memory holds 24 a task, dynamic batches 8 new examples."""
    answer = clpet("train", "method=crl", replay, *tiny_args(words), "dry_run=true")
    assert answer.code == 0, answer.err
    assert f"steps    {steps}" in answer.out
