"""A task that is under way: what each of its fits came to, when that is written down, and how a fit goes on from it.

A run that was cut off loads the checkpoint from before the task and learns the task once more. What lies outside of
fits is computed again; a fit that was over is passed over, and the one that was under way goes on at its step.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import cpu_copy
from clpet.runtime.signals import GracefulShutdown

Write = Callable[[int, dict[str, Any]], None]


class BestWeights:
    """A copy of the trained tensors at their best validation score."""

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float]) -> None:
        self.parameters, self.validate = parameters, validate
        self.score = float("-inf")
        self.copy = [parameter.detach().clone() for parameter in parameters]

    def update(self) -> float:
        """Validates; a strictly better score is the new best."""
        score = self.validate()
        if score > self.score:
            self.score = score
            put(self.parameters, self.copy)
        return score

    def restore(self) -> None:
        """Gives the trained tensors their best values."""
        put(self.copy, self.parameters)


class FitState:
    """One fit as it goes on: what is trained, by which optimiser, and where it stands in its plan."""

    def __init__(
        self,
        stage: str,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        best: BestWeights | None,
        device: torch.device,
    ) -> None:
        self.stage, self.named, self.optimizer, self.best = stage, named, optimizer, best
        self.parameters = list(named.values())
        self.total, self.finite = torch.zeros((), device=device), torch.zeros((), device=device)
        self.epoch = self.step = self.seen = 0

    def next_epoch(self) -> None:
        """Counts of an epoch start anew."""
        self.epoch += 1
        self.step = self.seen = 0
        self.total, self.finite = torch.zeros_like(self.total), torch.zeros_like(self.finite)

    def add(self, loss: Tensor) -> None:
        """Adds a step's loss to the epoch's; counts the steps up to the first that is no number."""
        self.total += loss
        self.finite += torch.isfinite(self.total)

    def state(self) -> dict[str, Any]:
        """Where the fit stands, without the trained tensors."""
        best = self.best and {"score": self.best.score, "copy": self.best.copy}
        counts = {name: getattr(self, name) for name in ("epoch", "step", "seen", "total", "finite")}
        return {**counts, "best": best, "optimizer": moments(self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.epoch, self.step, self.seen = state["epoch"], state["step"], state["seen"]
        self.total.copy_(state["total"])
        self.finite.copy_(state["finite"])
        if self.best:
            self.best.score = state["best"]["score"]
            put(state["best"]["copy"], self.best.copy)
        load_moments(self.optimizer, state["optimizer"])


class FitCheckpointer:
    """Holds the states of a task's fits and writes them every `minutes`, and when a signal asks; else writes nothing.

    `write` takes a number, higher for every later state of the task, and the record. Without it nothing is kept.
    """

    def __init__(self, method: Any = None, minutes: float = math.inf, shutdown: GracefulShutdown | None = None) -> None:
        self.method, self.seconds, self.shutdown = method, 60 * minutes, shutdown or GracefulShutdown()
        self.shutdown.save = self.save_pending
        self.start_task(None, None)
        self.mark_saved()

    def start_task(self, record: dict[str, Any] | None, write: Write | None) -> None:
        """A task begins; `record` is what was written of it before the run was cut off."""
        self.write = write
        self.saved = list(record["fits"]) if record else []
        self.finished_fits: list[dict[str, Any]] = []
        self.steps = 0  # of the fits that are over
        self.unsaved = False  # whether one of them is not written

    @contextlib.contextmanager
    def task_boundary(self) -> Iterator[None]:
        """A checkpoint between tasks is written inside: of the task there is nothing more to write."""
        with self.shutdown.deferred():
            yield
            self.start_task(None, None)
            self.mark_saved()

    def mark_saved(self) -> None:
        """A checkpoint is there: the next one is due in `minutes`."""
        self.due_at = time.monotonic() + self.seconds

    def should_save(self) -> bool:
        """Whether it is time to write: where one rank is asked to stop, all are."""
        if self.write is None:
            return False
        asked, late = get_world().all_reduce_max(self.shutdown.pending_signal or 0, time.monotonic() >= self.due_at)
        if asked:
            self.shutdown.pending_signal = int(asked)
        return bool(asked or late)

    def resume(self, parameters: list[nn.Parameter]) -> dict[str, Any] | None:
        """Restores what the next fit left, and returns it; None where it has not begun yet."""
        if not self.saved:
            return None
        state = self.saved.pop(0)
        put(state["trained"], parameters)
        self.method.load_task_state(state["method"])
        states, index = [state["random"], *state.get("ranks", [])], get_world().index
        if index < len(states):  # else a run on fewer ranks wrote it, and this one draws anew
            set_random_state(states[index], self.method.objective.device)
        self.method.objective.meter.load(state["cost"])
        return state

    def save(self, fit: FitState, done: int) -> None:
        """Writes the task as it stands in the middle of a fit of which `done` steps were taken."""
        self._write(self.steps + done, [*self.finished_fits, {**self._common(fit.parameters), **fit.state()}])

    def finish(self, parameters: list[nn.Parameter], steps: int, state: dict[str, Any]) -> None:
        """A fit of `steps` is over; `state` is what the trainer keeps of it."""
        if self.write is None:
            return
        self.record_finished(cpu_copy({**self._common(parameters), "over": state}), steps)
        self.unsaved = True
        if self.should_save():
            self.save_pending()

    def record_finished(self, state: dict[str, Any], steps: int) -> None:
        """A fit that is over has this state."""
        self.finished_fits.append(state)
        self.steps += steps + 1  # that it is over is a state of its own

    def save_pending(self) -> None:
        """Writes the fits that are over, if they are not written."""
        if self.write is not None and self.unsaved:
            self._write(self.steps, self.finished_fits)

    def _write(self, number: int, fits: list[dict[str, Any]]) -> None:
        assert self.write
        self.write(number, {"fits": fits})
        self.unsaved = False
        self.mark_saved()

    def _common(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        objective = self.method.objective
        mine, *others = get_world().gather(random_state(objective.device))
        return {
            "trained": parameters,
            "method": self.method.task_state(),
            "random": mine,
            "cost": objective.meter.state(),
            **({"ranks": others} if others else {}),
        }


@torch.no_grad()
def put(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Gives tensors the values of others."""
    for value, tensor in zip(values, into, strict=True):
        tensor.copy_(value)


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """What an optimiser holds of each trained tensor; empty for one that never had a gradient."""
    found = optimizer.state_dict()["state"]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return [found.get(index, {}) for index in range(count)]


def load_moments(optimizer: torch.optim.Optimizer, state: list[dict[str, Tensor]]) -> None:
    """The inverse of `moments`, on a fresh optimiser."""
    held = {index: {name: value.clone() for name, value in own.items()} for index, own in enumerate(state) if own}
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state(device: torch.device) -> dict[str, Any]:
    """Of every global generator."""
    legacy: Any = np.random.get_state()
    numpy = [legacy[0], legacy[1].tolist(), *legacy[2:]]
    found = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, key, gauss = state["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
