"""A signal stops a run at its next step, or at once outside training; the same command resumes it."""

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
    contents = json.loads(path.read_text())
    for cost in contents["cost"]:
        # Logits cached in memory are lost when a process ends, so a resumed run evaluates more examples.
        for key in ("seconds", "evaluation_seconds", "peak_memory_mb", "evaluated_examples"):
            del cost[key]
    return {key: contents[key] for key in ("scores", "correct", "task_scores", "cost")}


def test_a_signal_saves_at_the_next_step(words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped once by each of the three signals ends like an undisturbed run, including its costs."""
    args = ["train", "method=dynamic_conpet", "method.selector_ratio=null", *tiny_args(words)]
    args += ["train.global_batch_size=4", "cache_dir=null"]
    assert clpet(*args, "output_dir=whole").code == 0
    step, steps_taken = Display.step, []
    plan = {5: signal.SIGUSR2, 30: signal.SIGTERM, 50: signal.SIGINT}  # in tasks 1, 2 (selector) and 2 (module)

    def signalling(self, *values) -> None:
        step(self, *values)
        steps_taken.append(1)
        if len(steps_taken) in plan:
            os.kill(os.getpid(), plan[len(steps_taken)])

    monkeypatch.setattr(Display, "step", signalling)
    for number, name in zip(plan, ("SIGUSR2", "SIGTERM", "SIGINT"), strict=True):
        stopped = clpet(*args, "output_dir=cut")
        assert (stopped.code, len(steps_taken)) == (EXIT_TEMPFAIL, number)
        assert stopped.err.splitlines()[-1].startswith(f"clpet: stopped by {name}")
        assert "re-run the same command to resume" in stopped.err
    resumed = clpet(*args, "output_dir=cut")
    assert resumed.code == 0
    assert "inside task 2" in resumed.out
    # The module of task 1, then two selectors and modules: no step was taken twice.
    assert len(steps_taken) == 12 + 2 * (24 + 24)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_during_evaluation_keeps_what_was_trained(
    words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["train", "method=sequential", *tiny_args(words)]
    evaluate, backward = Evaluator.__call__, Trainer._backward
    evaluations, trained_tasks = [], []

    def signalling(self, *values):
        evaluations.append(1)
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *values)

    monkeypatch.setattr(Evaluator, "__call__", signalling)
    assert clpet(*args).code == EXIT_TEMPFAIL
    monkeypatch.setattr(
        Trainer, "_backward", lambda self, *rest: trained_tasks.append(self.task) or backward(self, *rest)
    )
    resumed = clpet(*args, "hardware.threads=2")
    assert resumed.code == 0
    warning = "the run began with threads 1, now 2: it ends equal to rounding, not bit for bit"
    assert warning in resumed.out + resumed.err
    assert set(trained_tasks) == {1, 2}
    assert len(evaluations) == 2 + 3 + 1  # one more on validation after the last task


def test_a_signal_ends_a_sweep(words: Path, clpet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Display, "step", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    assert clpet("train", "-m", "method=sequential,replay", *tiny_args(words)).code == EXIT_TEMPFAIL
    assert len(list(tmp_path.glob("outputs/*/*/s*/run.json"))) == 1


def test_a_second_ctrl_c_raises_keyboard_interrupt_at_once() -> None:
    with GracefulShutdown() as shutdown, pytest.raises(KeyboardInterrupt):
        two_ctrl_c(shutdown)


def two_ctrl_c(shutdown: GracefulShutdown) -> None:
    with shutdown.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_previous_handler_decides_how_the_process_ends() -> None:
    """Like submitit's handlers: that of SIGUSR2 ends the process after the save, that of SIGTERM returns."""
    events = []

    def requeue(signum: int, frame: object) -> None:
        events.append("requeue")
        raise SystemExit(-1)

    handlers = {signal.SIGUSR2: requeue, signal.SIGTERM: lambda *_: events.append("bypass")}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        with pytest.raises(SystemExit) as ended, GracefulShutdown() as shutdown:
            sigterm_then_sigusr2(shutdown, events)
        assert events == ["save", "bypass", "step", "requeue"]
        assert ended.value.code == -1
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def sigterm_then_sigusr2(shutdown: GracefulShutdown, events: list[str]) -> None:
    shutdown.save = lambda: events.append("save")
    os.kill(os.getpid(), signal.SIGTERM)
    with shutdown.deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
        events.append("step")


@pytest.mark.parametrize(("state", "code"), [("RUNNING", -1), ("COMPLETING", 75), ("", 75)])
def test_sigterm_from_slurm_requeues_only_a_job_that_is_still_running(
    state: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that SLURM has already requeued or cancelled exits; in the grace time of a preemption it requeues itself."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$2" = --jobs=7_3 ] && echo {state}\n')
    squeue.chmod(0o755)
    for key, value in {"PATH": str(tmp_path), "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9",
                       "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)

    def requeue(signum: int, frame: object) -> None:
        raise SystemExit(-1)

    handlers = {signal.SIGUSR2: requeue, signal.SIGTERM: lambda *_: None}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        with pytest.raises(SystemExit) as ended, GracefulShutdown():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert ended.value.code == code


def test_without_a_previous_handler_the_process_exits_with_code_75() -> None:
    with pytest.raises(Interrupted) as ended, GracefulShutdown():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert ended.value.code == EXIT_TEMPFAIL == 75
