"""Claims of ConPET: the ranking of methods, and a cost per task that does not grow with the number of tasks."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from clpet.data.batches import Encoded, EncodedDataset
from clpet.evaluation.evaluator import Evaluator
from clpet.methods.dynamic_conpet import DynamicConPET
from clpet.methods.replay import Replay
from clpet.replay.sampled import DynamicReplay


@pytest.fixture(scope="module")
def relations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 artificial relations in 6 tasks: each text repeats its relation's word three times among two of 12 other words."""
    folder, rng = tmp_path_factory.mktemp("relations"), random.Random(1)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = rng.sample([a + b for a in syllables for b in syllables], 24)
    for split, count in (("train", 40), ("validation", 4), ("test", 12)):
        lines = []
        for label in range(12):
            for _ in range(count):
                text = [*[words[label]] * 3, *rng.sample(words[12:], 2)]
                rng.shuffle(text)
                lines.append(json.dumps({"text": " ".join(text), "label": f"r{label:02d}"}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def whole_accuracy(make, relations: Path):
    """Micro-averaged accuracy in percent after the last task, and that of the selector."""

    def measure(*overrides: str) -> tuple[float, float | None]:
        setting = ["benchmark.task=null", "benchmark.classes_per_task=2", "benchmark.max_length=40"]
        run = make(f"data_dir={relations}", *setting, "train.lr=1e-2", "train.epochs=5", *overrides)
        for index in range(6):
            run.learn(index)
        evaluation = Evaluator(run.benchmark, run.data)(run.method, 6, list(range(6)))
        correct = sum(score.correct for score in evaluation.seen.values())
        return 100 * correct / len(run.data.test), evaluation.diagnostics.get("selector_whole")

    return measure


DYNAMIC = ["method=dynamic_conpet", "replay.limit=10"]


@pytest.mark.slow
def test_one_module_beats_two_and_two_beat_all_and_all_data_beat_a_limit(whole_accuracy) -> None:
    """The order is the published one, and an example that is right was routed to the right module.

    Seed 0 gives 85, 59, 22 and 99 %; with other seeds one and two modules may be equally good.
    """
    one, selector = whole_accuracy(*DYNAMIC)
    two, _ = whole_accuracy(*DYNAMIC, "method.top_k=2")
    every, _ = whole_accuracy(*DYNAMIC, "method.top_k=6")
    limitless, _ = whole_accuracy("method=dynamic_conpet", "replay=all")
    assert one <= selector + 1e-6
    assert one > two + 10
    assert two > every + 15
    assert limitless > one + 5


@pytest.mark.slow
def test_replay_is_far_above_regularisation(whole_accuracy) -> None:
    """EMR* is tens of points above EWC and LwF, which end near a sixth, the fraction of the last task."""
    replay, _ = whole_accuracy("method=emr", "replay=dynamic", "replay.limit=10")
    ewc, _ = whole_accuracy("method=ewc")
    lwf, _ = whole_accuracy("method=lwf")
    assert replay > max(ewc, lwf) + 30
    assert max(ewc, lwf) < 25


@pytest.mark.parametrize(
    ("limit", "sizes", "static", "dynamic"),
    [(400, [4480] * 10, 25_600, 38_400), (2500, [30415, 24780, 51816, 101875], 160_000, 240_000)],
    ids=["FewRel", "FewNERD"],
)
def test_examples_of_a_task_are_a_constant(limit: int, sizes: list[int], static: int, dynamic: int) -> None:
    """EMR* takes S E B examples, a selector and a module that skips old examples 1.5 times that (2 of 10 epochs)."""
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    pool = EncodedDataset([[1]] * len(tasks), tasks.tolist(), tasks.tolist(), 0, -1)
    data = Encoded(pool, pool, pool)
    for method in (Replay(), DynamicConPET()):
        method.data, method.seed, method.replay = data, 0, DynamicReplay(limit=limit)
        method.replay.setup(data, 0, 8)
        for index in range(len(sizes)):
            plans = [method.plan(index)]
            if isinstance(method, DynamicConPET):
                plans.append(method.replay.plan(index, "selector"))
            drawn = [(plan, rows) for plan in plans for epoch in (0, 9) for rows in plan.epoch(epoch)]
            computed = 5 * sum(
                int(plan.gradient_mask(rows).sum()) if plan.gradient_mask else len(rows) for plan, rows in drawn
            )
            if index > 0:
                assert computed == (dynamic if isinstance(method, DynamicConPET) else static)
            method.replay.update_memory(index, lambda rows: rows)


@pytest.mark.slow
def test_the_tenth_task_takes_as_long_as_the_second(make, tmp_path: Path) -> None:
    """Processor time of learning is constant with dynamic replay and grows if all data are replayed."""
    lines = [
        json.dumps({"text": f"{label} {i}", "label": f"{label:02d}"}) + "\n" for label in range(20) for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    setting = [f"data_dir={tmp_path}", "benchmark.task=null", "benchmark.classes_per_task=2", "train.epochs=1"]

    def growth(*overrides: str) -> float:
        run = make("method=dynamic_conpet", *setting, *overrides)
        seconds = []
        for index in range(10):
            start = time.process_time()
            run.learn(index)
            seconds.append(time.process_time() - start)
        return float(np.median(seconds[7:]) / np.median(seconds[1:4]))

    assert growth("replay=dynamic", "replay.limit=20") < 1.5 < growth("replay=all")
