"""dry_run=true says what a run would do, and does one step of it."""

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


@pytest.mark.parametrize(("method", "more"), STAGED, ids=str)
def test_the_stages_said_beforehand_are_those_that_are_run(method: str, more: list[str], make) -> None:
    """Steps of every fit, task by task."""
    run = make(f"method={method}", *more)
    curriculum, replay = run.method.curriculum(), run.method.replay
    said = {}
    for index, _ in curriculum:
        said[index] = [plan.steps for plan in run.method.stages(index).values()]
        replay.update_memory(index, random_features)
    replay.setup(run.data, run.config.seed, replay.batch_size)
    done: list[int] = []
    run.trainer.progress.fit = lambda stage, epochs, steps: done.append(steps)
    for index, task in curriculum:
        done.clear()
        run.trainer.begin_task(index)
        run.method.learn(task, index, run.trainer)
        run.method.after_task(task, index)
        assert done == said[index]


@pytest.mark.parametrize(("method", "more"), STAGED, ids=str)
def test_a_trial_is_one_step(method: str, more: list[str], make) -> None:
    """No method sends more than the first batch through the network, before or after its backward pass."""
    run = make(f"method={method}", *more)
    run.trainer.dry_run = True
    index, task = run.method.curriculum()[0]
    run.trainer.begin_task(index)
    run.method.learn(task, index, run.trainer)
    cost = run.method.objective.meter.take_learning()
    assert 0 < cost["backward_examples"] <= 16
    assert cost["forward_examples"] <= 2 * cost["backward_examples"]


@pytest.mark.parametrize(
    ("method", "steps"), [("replay=fixed", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 10"),
                          ("replay=dynamic", "fruit contrast 4; metal contrast 4 + replay 6; river contrast 4 + replay 6")]
)  # fmt: skip
def test_dry_run_lists_both_stages_of_crl(method: str, steps: str, words: Path, clpet) -> None:
    """24 examples a task in batches of 16, two epochs; the memory holds 24 a task, dynamic batches 8 new examples."""
    found = clpet("train", "method=crl", method, *tiny_args(words), "dry_run=true")
    assert found.code == 0, found.err
    assert f"steps    {steps}" in found.out
