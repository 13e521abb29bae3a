"""A signal ends a run at its next step, or at once outside of training; the same command goes on."""

import json
import os
import signal
from pathlib import Path

import pytest

from clpet.evaluation.evaluator import Evaluator
from clpet.reporting.progress import Display
from clpet.runtime.signals import EXIT_TEMPFAIL, GracefulShutdown, Interrupted
from clpet.training.trainer import Trainer
from tests.conftest import tiny_args


def results(root: Path) -> dict:
    (path,) = root.glob("*/*/s*/results.json")
    found = json.loads(path.read_text())
    for cost in found["cost"]:
        for key in ("seconds", "evaluation_seconds", "peak_memory_mb", "evaluated_examples"):  # logits held are lost
            del cost[key]
    return {key: found[key] for key in ("scores", "correct", "task_scores", "cost")}


def test_a_signal_saves_at_the_next_step(words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three signals once, in one run: it ends like one that was left alone, its costs included."""
    args = ["train", "method=dynamic_conpet", "method.selector_ratio=null", *tiny_args(words)]
    args += ["train.global_batch_size=4", "cache_dir=null"]
    assert clpet(*args, "output_dir=whole").code == 0
    step, taken = Display.step, []
    plan = {5: signal.SIGUSR2, 30: signal.SIGTERM, 50: signal.SIGINT}  # in tasks 1, 2 (selector) and 2 (module)

    def signalling(self, *values) -> None:
        step(self, *values)
        taken.append(1)
        if len(taken) in plan:
            os.kill(os.getpid(), plan[len(taken)])

    monkeypatch.setattr(Display, "step", signalling)
    for number, name in zip(plan, ("SIGUSR2", "SIGTERM", "SIGINT"), strict=True):
        stopped = clpet(*args, "output_dir=cut")
        assert (stopped.code, len(taken)) == (EXIT_TEMPFAIL, number)
        assert stopped.err.splitlines()[-1].startswith(f"clpet: stopped by {name}")
        assert "the same command goes on" in stopped.err
    again = clpet(*args, "output_dir=cut")
    assert again.code == 0
    assert "inside task 2" in again.out
    assert len(taken) == 12 + 2 * (24 + 24)  # of a module, then selectors and modules: no step was taken twice
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_signal_during_evaluation_keeps_what_was_trained(
    words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["train", "method=sequential", *tiny_args(words)]
    evaluate, backward = Evaluator.__call__, Trainer._backward
    measured, trained = [], []

    def signalling(self, *values):
        measured.append(1)
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *values)

    monkeypatch.setattr(Evaluator, "__call__", signalling)
    assert clpet(*args).code == EXIT_TEMPFAIL
    monkeypatch.setattr(Trainer, "_backward", lambda self, *rest: trained.append(self.task) or backward(self, *rest))
    again = clpet(*args, "hardware.threads=2")
    assert again.code == 0
    assert "the run began with threads 1, now 2: it ends equal to rounding, not bit for bit" in again.out + again.err
    assert set(trained) == {1, 2}
    assert len(measured) == 2 + 3 + 1  # after the last task on validation, too


def test_a_signal_ends_a_sweep(words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Display, "step", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    assert clpet("train", "-m", "method=sequential,replay", *tiny_args(words)).code == EXIT_TEMPFAIL
    assert len(list(tmp_path.glob("outputs/*/*/s*/run.json"))) == 1


def test_a_second_interrupt_from_the_keyboard_ends_at_once() -> None:
    with GracefulShutdown() as shutdown, pytest.raises(KeyboardInterrupt):
        twice(shutdown)


def twice(shutdown: GracefulShutdown) -> None:
    with shutdown.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_handler_that_was_there_before_decides() -> None:
    """As submitit's: that of SIGUSR2 ends the process after the save, that of SIGTERM lets it go on."""
    events = []

    def requeue(signum: int, frame: object) -> None:
        events.append("requeue")
        raise SystemExit(-1)

    held = {signal.SIGUSR2: requeue, signal.SIGTERM: lambda *_: events.append("bypass")}
    before = {signum: signal.signal(signum, handler) for signum, handler in held.items()}
    try:
        with pytest.raises(SystemExit) as ended, GracefulShutdown() as shutdown:
            one_then_the_other(shutdown, events)
        assert events == ["save", "bypass", "step", "requeue"]
        assert ended.value.code == -1
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def one_then_the_other(shutdown: GracefulShutdown, events: list[str]) -> None:
    shutdown.save = lambda: events.append("save")
    os.kill(os.getpid(), signal.SIGTERM)
    with shutdown.deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
        events.append("step")


@pytest.mark.parametrize(("state", "code"), [("RUNNING", -1), ("COMPLETING", 75), ("", 75)])
def test_slurm_s_term_requeues_only_a_job_that_still_runs(
    state: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that SLURM has requeued or cancelled by itself leaves; in a preemption's grace time it has to ask."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$2" = --jobs=7_3 ] && echo {state}\n')
    squeue.chmod(0o755)
    for key, value in {"PATH": str(tmp_path), "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9",
                       "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)

    def requeue(signum: int, frame: object) -> None:
        raise SystemExit(-1)

    held = {signal.SIGUSR2: requeue, signal.SIGTERM: lambda *_: None}
    before = {signum: signal.signal(signum, handler) for signum, handler in held.items()}
    try:
        with pytest.raises(SystemExit) as ended, GracefulShutdown():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert ended.value.code == code


def test_without_one_the_process_leaves_with_its_own_code() -> None:
    with pytest.raises(Interrupted) as ended, GracefulShutdown():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert ended.value.code == EXIT_TEMPFAIL == 75
