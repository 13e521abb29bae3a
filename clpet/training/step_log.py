"""The step log: loss, learning rate, gradient norm, speed and memory of every N-th optimiser step."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clpet.objectives.cost_meter import peak_memory_mb
from clpet.reporting.step_lines import StepLine
from clpet.runtime.sharding.gradients import total_norm
from clpet.training.step import StepContext

Write = Callable[[Sequence[StepLine]], None]
FLUSH_SECONDS = 5.0  # most seconds that a line waits on the device


class StepLog:
    """Passes lines about steps to `write`: of every `every`-th step of a run, and of the last step of every fit.

    With `every` = 0, or without `write`, nothing is recorded. Losses and gradient norms stay on the device until
    several lines are written together, since reading a value at every step would make the CPU wait for the GPU.
    """

    def __init__(self, every: int = 0, write: Write | None = None) -> None:
        self.every, self.write = every, write
        self.pending: list[StepLine] = []
        self.values: list[Tensor] = []  # [2] loss and gradient norm of the pending lines that have them
        self.flushed_at = time.perf_counter()
        self.start_task(1, "", 0)

    def subscribe(self, write: Write) -> None:
        """Starts recording; `write` gets the lines."""
        self.write = write

    def start_task(self, position: int, name: str, steps_before: int) -> None:
        """Starts task `position`, counted from 1, after `steps_before` steps of earlier tasks."""
        self.position, self.name, self.steps_before = position, name, steps_before

    def start_fit(self, stage: str, done: int, remaining: int) -> None:
        """Starts or resumes a fit of `remaining` steps, after `done` steps of the task."""
        self.stage, self.done, self.last = stage, done, done + remaining
        self._start_window()

    def expect_another(self) -> None:
        """The fit has one more step than was said at its start."""
        self.last += 1

    def _start_window(self) -> None:
        self.examples = self.tokens = 0
        self.since = time.perf_counter()

    def step(self, context: StepContext, lr: float, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Records a step before its update; the gradients of `parameters` are complete and not clipped yet."""
        if not (self.every and self.write):
            return
        self.done += 1
        self.examples += len(context.rows)
        self.tokens += 0 if context.pool is None else int(context.pool.lengths[context.rows].sum())
        if (self.steps_before + self.done) % self.every and self.done != self.last:
            return
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        line = self._line(context.epoch + 1)
        line |= {"loss": None, "lr": float(lr), "grad_norm": None}  # loss and norm are filled in by `flush`
        line |= {"examples_per_s": round(self.examples / seconds, 2), "tokens_per_s": round(self.tokens / seconds, 1)}
        line["memory_gb"] = round(peak_memory_mb(loss.device) / 1024, 3)
        self.pending.append(line)
        self.values.append(torch.stack([loss.detach().float(), _gradient_norm(parameters).to(loss.device)]))
        if now - self.flushed_at >= FLUSH_SECONDS:
            self.flush()
        self._start_window()

    def validated(self, epoch: int, score: float) -> None:
        """Records the score on validation after an epoch, counted from 1."""
        if self.every and self.write:
            self.pending.append({**self._line(epoch), "validation": score})
            self.flush()
            self._start_window()  # the time of the validation does not count

    def flush(self) -> None:
        """Reads the pending values from the device, all at once, and writes the pending lines."""
        if not (self.pending and self.write):
            return
        values = iter(torch.stack(self.values).tolist() if self.values else ())
        for line in self.pending:
            if "loss" in line:
                loss, norm = next(values)
                line["loss"], line["grad_norm"] = _finite(loss), _finite(norm)
        self.write(self.pending)
        self.pending, self.values, self.flushed_at = [], [], time.perf_counter()

    def _line(self, epoch: int) -> StepLine:
        """The keys that place a line in the run."""
        step = self.steps_before + self.done
        return {
            "step": step, "task": self.position, "task_name": self.name, "stage": self.stage, "epoch": epoch
        }  # fmt: skip


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together, as clipping measures it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return total_norm(gradients).detach().float()


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None
