"""Progress of a running experiment: a live bar on a terminal, plain lines elsewhere."""

import logging
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from clpet.escape import inline
from clpet.reporting.tables import say

if TYPE_CHECKING:  # `clpet runs` and `clpet show` import reporting and must not wait for torch
    from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_EVERY = 15.0  # seconds between plain lines
LIVE_EVERY = 0.2  # seconds between updates of the bar


class Display:
    """Shows task i of T, stage, epoch, loss, examples per second and the estimated time left."""

    def __init__(self, console: Console, tasks: int) -> None:
        self.console, self.tasks = console, tasks
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self.task_seconds: list[float] = []

    def task(self, position: int, name: str) -> None:
        """Starts a task. Positions count from 1; 0 is the training of the base model before all tasks."""
        self.position, self.name, self.task_start = position, name, time.perf_counter()

    def task_done(self) -> None:
        """Ends a task, after its evaluation."""
        self._end_bar()
        self.task_seconds.append(time.perf_counter() - self.task_start)

    def close(self) -> None:
        """Removes the live bar and restores the terminal."""
        self._end_bar()

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """Starts a training stage of `epochs` times `steps` optimizer steps."""
        self._end_bar()
        self.stage, self.epochs, self.steps = stage, epochs, steps
        self.start = self.last_shown = time.perf_counter()
        self.seen = self.before = self.skipped = 0
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), console=self.console, transient=True
            )
            self.live.start()
            self.bar = self.live.add_task(self._title(1), total=epochs * steps)

    def resumed(self, steps: int, examples: int) -> None:
        """Continues a stage after `steps` steps. They took no time in this process: rates and estimates skip them."""
        self.skipped, self.before = steps, -examples if steps % self.steps else 0

    def step(self, epoch: int, step: int, examples: int, loss: "Tensor") -> None:
        """Reports a finished step. `loss` is read only when a line is due, since reading it waits for the device."""
        self.seen = self.before + examples
        done = epoch * self.steps + step
        now = time.perf_counter()
        last = done == self.epochs * self.steps
        if step == self.steps:
            self.before = self.seen
        if now - self.last_shown < (LIVE_EVERY if self.live else PLAIN_EVERY) and not last:
            return
        self.last_shown = now
        rate = self.seen / (now - self.start)
        text = f"loss {loss.item():.3f} · {rate:.0f} examples/s · {self._left(now, done)} left"
        if self.live and self.bar is not None:
            self.live.update(self.bar, completed=done, description=f"{self._title(epoch + 1)} · {text}")
        if last or not self.live:
            self.print(f"{self._title(epoch + 1)} · {text}")

    def validated(self, epoch: int, score: float) -> None:
        """Prints the validation score (0 to 1) of an epoch."""
        self.print(f"{self._title(epoch)} · validation {100 * score:.2f}")

    def print(self, text: str = "") -> None:
        """Prints a line above the bar, and writes it to train.log."""
        log.info(text)
        say(self.console, text)

    def _title(self, epoch: int) -> str:
        stage = f" · {self.stage}" if self.stage else ""
        which = f"task {self.position}/{self.tasks} " if self.position else ""
        return f"{which}{inline(self.name)}{stage} · epoch {epoch}/{self.epochs}"

    def _left(self, now: float, done: int) -> str:
        """h:mm:ss left: the rest of this stage at its speed so far, and the mean time of a task for those to come."""
        stage = (now - self.start) / (done - self.skipped) * (self.epochs * self.steps - done)
        mean = sum(self.task_seconds) / len(self.task_seconds) if self.task_seconds else now - self.task_start
        seconds = int(stage + mean * (self.tasks - self.position))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _end_bar(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
