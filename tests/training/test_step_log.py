"""The step log: its numbers, and that it changes nothing in training and has every step once after a resume."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clpet.reporting.plots.loss import loss_curve
from clpet.reporting.progress import Display
from clpet.reporting.step_lines import read_steps
from clpet.runtime.signals import EXIT_TEMPFAIL
from clpet.training import step_log
from clpet.training.step import StepContext
from clpet.training.step_log import StepLog
from tests.conftest import tiny_args

TIMES = ("examples_per_s", "tokens_per_s", "memory_gb")


class Pool:
    lengths = np.array([2, 3, 5, 7])


def parameter(*gradient: float) -> nn.Parameter:
    result = nn.Parameter(torch.zeros(len(gradient)))
    result.grad = torch.tensor(gradient)
    return result


def test_lines_hold_the_numbers_of_their_step_and_rates_since_the_line_before(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: clock[0])
    written: list = []
    log = StepLog(2, lambda lines: written.append(list(lines)))
    log.start_task(3, "metal", 10)
    log.start_fit("module", 0, 3)
    parameters = [parameter(3.0, 4.0), nn.Parameter(torch.zeros(1)), parameter(12.0)]
    for step in range(3):  # steps 11 to 13 of the run: 12 is a multiple of 2, 13 is the last of the fit
        clock[0] += 0.5
        context = StepContext(2, "module", 0, step, np.array([0, 1] if step else [2, 3]), Pool())
        log.step(context, 0.5, torch.tensor([0.25, 1.5, math.nan][step]), parameters)
    log.flush()
    (lines,) = written
    place = {"task": 3, "task_name": "metal", "stage": "module", "epoch": 1, "lr": 0.5}
    assert [{key: line[key] for key in line if key not in TIMES} for line in lines] == [
        {"step": 12, **place, "loss": 1.5, "grad_norm": 13.0},
        {"step": 13, **place, "loss": None, "grad_norm": 13.0},
    ]
    first, second = lines
    assert (first["examples_per_s"], first["tokens_per_s"]) == (4, 17)  # 4 examples of 12 and 5 tokens in a second
    assert (second["examples_per_s"], second["tokens_per_s"]) == (4, 10)  # 2 examples of 5 tokens in half a second
    assert list(first)[:5] == ["step", "task", "task_name", "stage", "epoch"]


def test_nothing_is_recorded_with_0() -> None:
    log = StepLog(0, lambda lines: pytest.fail("written"))
    log.start_fit("", 0, 1)
    log.step(StepContext(0, "", 0, 0, np.array([0]), Pool()), 0.5, torch.tensor(1.0), [])
    log.validated(1, 0.5)
    log.flush()


def test_values_are_read_together(monkeypatch) -> None:
    """A read makes the CPU wait for the device: there is one for many lines."""
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    log = StepLog(1, lambda lines: None)
    log.start_fit("", 0, 50)
    for step in range(50):
        log.step(StepContext(0, "", 0, step, np.array([0]), Pool()), 0.5, torch.tensor(1.0), [parameter(1.0)])
    log.flush()
    assert reads == [(50, 2)]


def test_training_is_the_same_bit_for_bit_with_and_without(make) -> None:
    runs = [make("method=ewc", "train.clip=0.1", "train.log_every=1") for _ in range(2)]
    lines: list = []
    runs[0].trainer.step_log.subscribe(lines.extend)
    for run in runs:
        run.learn(0)
        run.learn(1)
    one, two = (run.method.named_parameters() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(lines) == 8
    assert all(line["grad_norm"] > 0.1 for line in lines)  # before clipping


def recorded(root: Path) -> list[dict]:
    (path,) = root.glob("*/*/s*/steps.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# Inside an epoch, at the last step of a fit, in the fit of a selector.
@pytest.mark.parametrize(
    "stop", [pytest.param(5, marks=pytest.mark.slow), 12, pytest.param(30, marks=pytest.mark.slow)]
)
def test_a_resumed_run_has_every_step_once(
    words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    args = ["train", "method=dynamic_conpet", "method.selector_ratio=null", *tiny_args(words), "cache_dir=null"]
    args += ["train.global_batch_size=4", "train.select=best", "train.log_every=2"]
    assert clpet(*args, "output_dir=whole").code == 0
    step, taken = Display.step, []

    def signalling(self, *values) -> None:
        step(self, *values)
        taken.append(1)
        if len(taken) == stop:
            os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", signalling)
        assert clpet(*args, "output_dir=cut").code == EXIT_TEMPFAIL
    (path,) = tmp_path.glob("cut/*/*/s*/steps.jsonl")
    with path.open("a") as file:  # what a killed run leaves behind after its last checkpoint
        file.write('{"step": 1000, "task": 9, "loss": 1.0}\n{"step": 10')
    assert clpet(*args, "output_dir=cut").code == 0
    whole, cut = recorded(tmp_path / "whole"), recorded(tmp_path / "cut")
    assert cut == whole
    assert [line["step"] for line in whole if "loss" in line] == list(range(2, 109, 2))
    assert {line["stage"] for line in whole} == {"", "selector"}
    assert [line["step"] for line in whole if line.get("validation") is not None][:3] == [6, 12, 24]


@pytest.mark.usefixtures("rendered")
def test_the_picture_has_a_curve_per_stage_and_validation_points(tmp_path: Path) -> None:
    place = {"task": 1, "task_name": "$a", "epoch": 1}
    lines = [
        {"step": 1, **place, "stage": "keys", "loss": -1.0},
        {"step": 2, **place, "stage": "", "loss": None},
        {"step": 3, **place, "stage": "", "loss": 1.0},
        {"step": 3, **place, "stage": "", "validation": 0.5},
        {"step": 4, **place, "task": 2, "stage": "", "loss": 0.5},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    assert read_steps(tmp_path) == lines
    assert read_steps(tmp_path / "absent") == []
    assert loss_curve(lines, tmp_path / "loss.png", "title").read_bytes().startswith(b"\x89PNG")
