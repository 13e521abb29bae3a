"""What the step log costs, run by scripts/bench.py step_log."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench import Bench, medians

from clpet.replay.batch_plan import BatchPlan
from clpet.runs import line_files
from clpet.training.progress import NoProgress
from clpet.training.step import StepHooks
from clpet.training.step_log import StepLog
from clpet.training.trainer import Trainer


def step_log(overrides: list[str], rounds: int) -> None:
    """Training with train.log_every=10 and without, in turn; and the share of the time that passes inside the log."""
    bench = Bench(overrides)
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.jsonl"
        logs = {"off": lambda: StepLog(), "on": lambda: StepLog(10, lambda lines: line_files.append(file, lines))}
        contenders: dict[str, Callable[[], float]] = {
            name: lambda new=new: fit_seconds(bench, new(), shares) for name, new in logs.items()
        }
        measured = medians("step log  seconds", contenders, rounds)
    print(f"on / off                  {measured['on'] / measured['off']:.4f}")
    print(f"share inside the log, on  {100 * statistics.median(shares[1::2]):.3f} %")


def fit_seconds(bench: Bench, log: StepLog, shares: list[float]) -> float:
    """Seconds of a fit on all training examples; the part of them inside the log is appended to `shares`."""
    method = bench.method()
    pool = method.data.train
    batches = pool.shuffled(np.arange(len(pool)), bench.batch, np.random.default_rng(0))
    trainer = Trainer(bench.config.train, bench.components.hardware, method.objective, NoProgress(), 0)
    trainer.step_log, inside = log, [0.0]
    log.step, log.flush = timed(log.step, inside), timed(log.flush, inside)
    start = time.perf_counter()
    trainer.fit(
        BatchPlan(pool, len(batches), lambda epoch: batches),
        method.named_parameters(),
        StepHooks(method.loss, step_loss=method.step_loss),
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    shares.append(inside[0] / seconds)
    return seconds


def timed(function: Callable[..., None], total: list[float]) -> Callable[..., None]:
    """The function, which adds the seconds of every call to total[0]."""

    def call(*arguments: object) -> None:
        start = time.perf_counter()
        function(*arguments)
        total[0] += time.perf_counter() - start

    return call
