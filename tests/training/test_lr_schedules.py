"""Learning rates at every step and over tasks, compared with values computed by hand."""

import math

import pytest
import torch

from clpet.config.schema import Schedule, Training
from clpet.errors import ConfigError
from clpet.training.lr_schedules import SchedulePosition, schedule, warmup


def rates(position: SchedulePosition, **options) -> list[float]:
    """The rate of every step, and that of the step after the last."""
    settings = Training(**{"lr": 1.0, **options})
    rate = schedule(settings, settings.lr_of(0), position)
    return [rate(step) for step in range(position.steps + 1)]


def test_warm_up_starts_from_zero_and_reaches_the_peak_after_its_steps() -> None:
    for name in Schedule:
        if name is not Schedule.infinite:
            assert rates(SchedulePosition(20), schedule=name, warmup_steps=4)[:5] == [0, 0.25, 0.5, 0.75, 1]


def test_first_and_last_step() -> None:
    assert rates(SchedulePosition(4), schedule=Schedule.constant) == [1] * 5
    assert rates(SchedulePosition(4), schedule=Schedule.linear) == [1, 0.75, 0.5, 0.25, 0]
    assert rates(SchedulePosition(4), schedule=Schedule.cosine, lr_min=0.5) == pytest.approx(
        [1, 0.75 + math.sqrt(2) / 8, 0.75, 0.75 - math.sqrt(2) / 8, 0.5]
    )


def test_a_share_limits_the_warm_up() -> None:
    settings = Training(warmup_steps=50, max_warmup_share=0.02)
    assert [warmup(settings, SchedulePosition(steps)) for steps in (150, 2500, 9000)] == [3, 50, 50]
    assert warmup(Training(warmup_steps=50), SchedulePosition(150)) == 50


def test_autoregressive_peaks_lie_on_one_cosine() -> None:
    """S = 1000, w = 50, from 3e-4 to 3e-5, with the cosine after all warm-up steps; each task ends at the floor."""
    options = {"schedule": Schedule.ar, "lr": 3e-4, "lr_min": 3e-5, "warmup_steps": 50}
    task_rates = [rates(SchedulePosition(1000, 1000 * k, 50 * k), **options) for k in range(5)]
    peaks = [3.0e-4, 1.65e-4, 9.75e-5, 6.954e-5, 5.578e-5]
    assert [rate[50] for rate in task_rates] == pytest.approx(peaks, abs=5e-9)
    assert [max(rate) for rate in task_rates] == [rate[50] for rate in task_rates]
    assert [rate[1000] for rate in task_rates] == pytest.approx([3e-5] * 5)


def test_autoregressive_peaks_of_unequal_tasks() -> None:
    """300 steps after 100: the peak is the cosine over 400 steps at a quarter of it."""
    task_rates = rates(SchedulePosition(300, 100), schedule=Schedule.ar)
    assert task_rates[0] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_an_infinite_schedule_spans_all_tasks() -> None:
    options = {"schedule": Schedule.infinite, "lr_min": 0.2, "warmup_steps": 2, "anneal_share": 0.4}
    assert rates(SchedulePosition(6), **options) == pytest.approx(
        [0, 0.5, 1, 0.8 + math.sqrt(2) / 10, 0.8, 0.8 - math.sqrt(2) / 10, 0.6]
    )
    assert rates(SchedulePosition(6, 6, 2), **options) == pytest.approx([0.6] * 7)
    assert rates(SchedulePosition(10, 12, 2, last=True), **options)[5:] == pytest.approx(
        [0.6, 0.6, 0.4 + math.sqrt(2) / 10, 0.4, 0.4 - math.sqrt(2) / 10, 0.2]
    )
    assert rates(SchedulePosition(6, 6, 2), **options, lr_constant=0.3) == pytest.approx([0.3] * 7)


def test_the_optimizer_gets_the_scheduled_rates(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 epochs of 6 steps in every task, from the peak to the rate before the floor."""
    used = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    run = make("method=sequential", "train.global_batch_size=4", "train.schedule=ar", "train.lr=1.2e-3")
    run.learn(0)
    run.learn(1)
    assert used[:12] == pytest.approx([6e-4 * (1 + math.cos(math.pi * t / 12)) for t in range(12)])
    assert used[12:] == pytest.approx([3e-4 * (1 + math.cos(math.pi * t / 12)) for t in range(12)])
    assert run.trainer.state()[""] == {"steps": 24, "warmup": 0}


@pytest.mark.parametrize(("option", "value"), [("lr_min", 2.0), ("max_warmup_share", 1.5), ("anneal_share", -0.1), ("lr_constant", -1.0)])  # fmt: skip
def test_values_out_of_range_are_rejected(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"train.{option}"):
        Training(lr=1.0, **{option: value})
