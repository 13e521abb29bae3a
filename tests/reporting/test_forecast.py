"""The predicted time left, against the real one, in runs on a simulated clock."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from rich.console import Console

from clpet.reporting.forecast import Forecast, TaskWork
from clpet.reporting.progress import Display, duration

STEPS = 50  # per epoch and stage


@dataclass
class Simulated:
    """A run whose fits, evaluations and other work take known times on a simulated clock."""

    works: list[TaskWork]
    per_token: dict[str, float]  # seconds per training token of every stage
    per_evaluated: Callable[[int], float] = lambda row: 0.001  # seconds per evaluated token after a row
    other: float = 0.0  # seconds per training token outside of fits
    unplanned: float = 0.0  # seconds per training token in a fit, before the others, that is not in the plan
    now: float = 0.0
    predictions: list[tuple[int, float, float]] = field(default_factory=list)  # position, time, seconds left

    def run(self) -> list[float]:
        """Predicted / real time left at every step, from 20 % of task 1 on."""
        display = Display(Console(file=io.StringIO()), len(self.works))
        display.forecast = Forecast(self.works, lambda: self.now)
        self.evaluate(display, 0)
        begin = self.now
        for position, work in enumerate(self.works, 1):
            display.task(position, "t")
            if self.unplanned:
                self.fit(display, position, "keys", work.training, self.unplanned)
            for stage, tokens in work.stages.items():
                self.fit(display, position, stage, tokens, self.per_token[stage])
            self.now += self.other * work.training
            self.evaluate(display, position)
            display.task_done()
            if position == 1:
                from_time = begin + 0.2 * (self.now - begin)
        ends = self.now
        return [left / (ends - time) for _, time, left in self.predictions if time >= from_time and ends - time > 1]

    def fit(self, display: Display, position: int, stage: str, tokens: float, per_token: float) -> None:
        display.fit(stage, 2, STEPS)
        for epoch in range(2):
            for step in range(1, STEPS + 1):
                self.now += per_token * tokens / (2 * STEPS)
                display.step(epoch, step, 16 * step, torch.tensor(1.0))
                left = display.forecast.left((epoch * STEPS + step) / (2 * STEPS))
                self.predictions.append((position, self.now, left))

    def evaluate(self, display: Display, row: int) -> None:
        tokens = self.works[max(row, 1) - 1].evaluation
        with display.evaluating(tokens):
            self.now += self.per_evaluated(row) * tokens


RUNS = {
    "tasks of one size": Simulated([TaskWork({"": 1e4}, 5e3)] * 5, {"": 0.01}),
    "a task ten times as long": Simulated([TaskWork({"": size}, 5e3) for size in (1e4, 1e5, 1e4)], {"": 0.01}),
    "fifteen tasks": Simulated([TaskWork({"": 1e3}, 5e3)] * 15, {"": 0.01}),
    "a slower stage from task 2 on": Simulated(
        [TaskWork({"module": 1e4}), *[TaskWork({"selector": 1e4, "module": 1e4})] * 4],
        {"module": 0.01, "selector": 0.015},
    ),
    "replay that grows": Simulated([TaskWork({"": 1e4 * n}, 5e3) for n in range(1, 9)], {"": 0.01}),
    "evaluation that costs more than training": Simulated(
        [TaskWork({"": 1e4}, 1e5)] * 5, {"": 0.01}, lambda row: 0.005
    ),
    "a first evaluation without a cache": Simulated(
        [TaskWork({"": 1e4}, 2e4)] * 5, {"": 0.01}, lambda row: 0.002 if row else 0.003
    ),
    "importance after every task": Simulated([TaskWork({"": 1e4}, 5e3)] * 5, {"": 0.01}, other=0.003),
    "a long fit outside of the plan": Simulated(
        [TaskWork({"module": 1e4}, 5e3)] * 5, {"module": 0.003}, unplanned=0.01
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_within_a_factor_of_1_5(name: str) -> None:
    ratios = RUNS[name].run()
    assert len(ratios) > 100
    assert min(ratios) > 1 / 1.5
    assert max(ratios) < 1.5


def test_a_hand_computed_prediction() -> None:
    """Task 1: 100 tokens in 10 s, half of them done; evaluation of 50 tokens at the 0.2 s a token of row 0."""
    now = [0.0]
    forecast = Forecast([TaskWork({"": 100}, 50), TaskWork({"": 300}, 50)], lambda: now[0])
    forecast.start_evaluation()
    now[0] = 10.0
    forecast.end_evaluation(50)
    forecast.start_task(1)
    forecast.start_fit("")
    now[0] = 15.0
    assert forecast.left(0.5) == pytest.approx(5 + 10 + 30 + 10)


def test_a_resumed_fit_is_measured_from_its_resume() -> None:
    now = [0.0]
    forecast = Forecast([TaskWork({"": 100})], lambda: now[0])
    forecast.start_task(1)
    forecast.start_fit("")
    forecast.resume_fit(0.8)
    now[0] = 2.0
    assert forecast.left(0.9) == pytest.approx(2.0)


def test_an_unnamed_fit_is_the_next_one_of_the_plan() -> None:
    now = [0.0]
    forecast = Forecast([TaskWork({"module": 100}), TaskWork({"selector": 100, "module": 100})], lambda: now[0])
    forecast.start_task(1)
    forecast.start_fit("")
    now[0] = 10.0
    assert forecast.left(1.0) == pytest.approx(20.0)
    forecast.end_task()
    forecast.start_task(2)
    forecast.start_fit("selector")
    now[0] = 15.0
    assert forecast.left(0.5) == pytest.approx(5 + 10)


def test_without_a_plan_the_rest_of_the_fit_is_predicted() -> None:
    now = [0.0]
    forecast = Forecast(clock=lambda: now[0])
    forecast.start_fit("")
    now[0] = 3.0
    assert forecast.left(0.25) == pytest.approx(9.0)


def test_off_a_terminal_there_is_a_line_a_minute() -> None:
    now, text = [0.0], io.StringIO()
    display = Display(Console(file=text, width=200), 1)
    display.forecast = Forecast([TaskWork({"": 100})], lambda: now[0])
    display.task(1, "a")
    display.fit("", 1, 300)
    for step in range(1, 301):
        now[0] += 1.0
        display.step(0, step, 16 * step, torch.tensor(0.5))
    lines = text.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "task 1/1 a · epoch 1/1 · loss 0.500 · 16 examples/s · 0:04:00 left"
    assert duration(3661.4) == "1:01:01"


def test_a_fit_outside_of_the_plan_counts_as_other_work() -> None:
    """Before it ends, the rate of training is three times that of the first evaluation."""
    now = [0.0]
    forecast = Forecast([TaskWork({"": 100}, 10)] * 2, lambda: now[0])
    forecast.start_evaluation()
    now[0] = 1.0
    forecast.end_evaluation(10)
    forecast.start_task(1)
    forecast.start_fit("keys")
    now[0] = 5.0
    assert forecast.left(0.5) == pytest.approx(4 + 2 * (100 * 0.3 + 1) + 8)  # task 2 is taken to have such a fit too
    now[0] = 9.0
    forecast.left(1.0)
    forecast.start_fit("")
    now[0] = 29.0
    forecast.left(1.0)
    forecast.start_evaluation()
    now[0] = 30.0
    forecast.end_evaluation(10)
    forecast.end_task()
    forecast.start_task(2)
    forecast.start_fit("keys")
    now[0] = 34.0
    assert forecast.left(0.5) == pytest.approx(4 + 20 + 1)
