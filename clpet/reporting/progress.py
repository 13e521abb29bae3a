"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import logging
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from clpet.escape import inline
from clpet.reporting.tables import say

if TYPE_CHECKING:  # reading runs back needs no torch
    from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_EVERY = 15.0  # seconds between plain lines
LIVE_EVERY = 0.2


class Display:
    """Shows task i of T, stage, epoch, loss, examples per second and the time left."""

    def __init__(self, console: Console, tasks: int) -> None:
        self.console, self.tasks = console, tasks
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self.task_seconds: list[float] = []

    def task(self, position: int, name: str) -> None:
        """A task begins; positions count from 1, 0 is what comes before all tasks."""
        self.position, self.name, self.task_start = position, name, time.perf_counter()

    def task_done(self) -> None:
        """A task's training and evaluation are over."""
        self._end_bar()
        self.task_seconds.append(time.perf_counter() - self.task_start)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._end_bar()

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """A stage of training begins."""
        self._end_bar()
        self.stage, self.epochs, self.steps = stage, epochs, steps
        self.start = self.shown = time.perf_counter()
        self.seen = self.before = self.skipped = 0
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), console=self.console, transient=True
            )
            self.live.start()
            self.bar = self.live.add_task(self._title(1), total=epochs * steps)

    def resumed(self, steps: int, examples: int) -> None:
        """The fit goes on where a run was cut off: what lies before takes no time now."""
        self.skipped, self.before = steps, -examples if steps % self.steps else 0

    def step(self, epoch: int, step: int, examples: int, loss: "Tensor") -> None:
        """A step is done; the loss is only read when a line is due, so that the device is not waited for."""
        self.seen = self.before + examples
        done = epoch * self.steps + step
        now = time.perf_counter()
        last = done == self.epochs * self.steps
        if step == self.steps:
            self.before = self.seen
        if now - self.shown < (LIVE_EVERY if self.live else PLAIN_EVERY) and not last:
            return
        self.shown = now
        rate = self.seen / (now - self.start)
        text = f"loss {loss.item():.3f} · {rate:.0f} examples/s · {self._left(now, done)} left"
        if self.live and self.bar is not None:
            self.live.update(self.bar, completed=done, description=f"{self._title(epoch + 1)} · {text}")
        if last or not self.live:
            self.print(f"{self._title(epoch + 1)} · {text}")

    def validated(self, epoch: int, score: float) -> None:
        """An epoch's validation score."""
        self.print(f"{self._title(epoch)} · validation {100 * score:.2f}")

    def print(self, text: str = "") -> None:
        """A line that stays, on the screen and in train.log."""
        log.info(text)
        say(self.console, text)

    def _title(self, epoch: int) -> str:
        stage = f" · {self.stage}" if self.stage else ""
        which = f"task {self.position}/{self.tasks} " if self.position else ""
        return f"{which}{inline(self.name)}{stage} · epoch {epoch}/{self.epochs}"

    def _left(self, now: float, done: int) -> str:
        stage = (now - self.start) / (done - self.skipped) * (self.epochs * self.steps - done)
        mean = sum(self.task_seconds) / len(self.task_seconds) if self.task_seconds else now - self.task_start
        seconds = int(stage + mean * (self.tasks - self.position))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _end_bar(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
