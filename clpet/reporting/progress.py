"""Progress of a running experiment: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from clpet.escape import inline
from clpet.reporting.forecast import Forecast
from clpet.reporting.tables import say

if TYPE_CHECKING:  # `clpet runs` and `clpet show` import reporting and must not wait for torch
    from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_EVERY = 60.0  # seconds between plain lines
LIVE_EVERY = 0.2  # seconds between updates of the bar


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


class Display:
    """Shows task i of T, stage, epoch, loss, examples per second and the estimated time left."""

    def __init__(self, console: Console, tasks: int) -> None:
        self.console, self.tasks = console, tasks
        self.forecast = Forecast()
        self.live: Progress | None = None
        self.bar: TaskID | None = None

    def task(self, position: int, name: str) -> None:
        """Starts a task. Positions count from 1; 0 is the training of the base model before all tasks."""
        self.position, self.name = position, name
        self.forecast.start_task(position)

    def task_done(self) -> None:
        """Ends a task, after its evaluation."""
        self._end_bar()
        self.forecast.end_task()

    @contextlib.contextmanager
    def evaluating(self, tokens: float) -> Iterator[None]:
        """The evaluation of `tokens` tokens happens in this block."""
        self.forecast.start_evaluation()
        yield
        self.forecast.end_evaluation(tokens)

    def close(self) -> None:
        """Removes the live bar and restores the terminal."""
        self._end_bar()

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """Starts a training stage of `epochs` times `steps` optimizer steps."""
        self._end_bar()
        self.stage, self.epochs, self.steps = stage, epochs, steps
        self.forecast.start_fit(stage)
        self.start = self.last_shown = self.forecast.clock()
        self.seen = self.before = 0
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), console=self.console, transient=True
            )
            self.live.start()
            self.bar = self.live.add_task(self._title(1), total=epochs * steps)

    def resumed(self, steps: int, examples: int) -> None:
        """Continues a stage after `steps` steps. They took no time in this process: rates and estimates skip them."""
        self.before = -examples if steps % self.steps else 0
        self.forecast.resume_fit(steps / (self.epochs * self.steps))

    def step(self, epoch: int, step: int, examples: int, loss: "Tensor") -> None:
        """Reports a finished step. `loss` is read only when a line is due, since reading it waits for the device."""
        self.seen = self.before + examples
        done = epoch * self.steps + step
        now = self.forecast.clock()
        last = done == self.epochs * self.steps
        if step == self.steps:
            self.before = self.seen
        if now - self.last_shown < (LIVE_EVERY if self.live else PLAIN_EVERY) and not last:
            return
        self.last_shown = now
        rate = self.seen / max(now - self.start, 1e-9)
        left = self.forecast.left(done / (self.epochs * self.steps))
        text = f"loss {loss.item():.3f} · {rate:.0f} examples/s · {duration(left)} left"
        if self.live and self.bar is not None:
            self.live.update(self.bar, completed=done, description=f"{self._title(epoch + 1)} · {text}")
        if last or not self.live:
            self.print(f"{self._title(epoch + 1)} · {text}")
        if last:
            self.forecast.end_fit()

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

    def _end_bar(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


class CountDisplay:
    """Shows how many of a known number of rows are done, and the time left: a bar on a terminal, else plain lines.

    Work that ends within `PLAIN_EVERY` seconds prints no plain line.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.start = self.last_shown = time.monotonic()
        self.live: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn()
            self.live = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> "CountDisplay":
        if self.live:
            self.live.start()
            self.bar = self.live.add_task(self.title, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, done: int, total: int) -> None:
        """Reports that `done` of `total` rows are done."""
        now = time.monotonic()
        if now - self.last_shown < (LIVE_EVERY if self.live else PLAIN_EVERY):
            return
        self.last_shown = now
        text = f"{self.title} {done} of {total} · {duration((now - self.start) * (total / done - 1))} left"
        if self.live:
            self.live.update(self.bar, total=total, completed=done, description=text)
        else:
            say(self.console, text)
