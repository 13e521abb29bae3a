"""Checkpoints inside a task: the state of every fit of the task, so that a stopped fit resumes at its step.

A resumed run loads the checkpoint from before the task and executes the task again. Code outside fits is executed
again; a finished fit is skipped and its result restored; an unfinished fit continues at its next step.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from clpet.objectives.base import Objective
from clpet.records import State
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import cpu_copy
from clpet.runtime.sharding.tensors import aligned
from clpet.runtime.signals import SIGNALS, GracefulShutdown
from clpet.training.fit_record import (
    CommonRecord,
    FinishedFit,
    FitRecord,
    NumpyState,
    ProgressRecord,
    RandomState,
    StageHistory,
    UnfinishedFit,
)
from clpet.training.optimizers import Optimizer

Write = Callable[[int, State], None]
LegacyState = tuple[str, np.ndarray, int, int, float]  # of NumPy's global generator


class Learner(Protocol):
    """The part of a method that checkpoints inside a task depend on."""

    @property
    def objective(self) -> Objective:
        """What is trained; it has the cost meter."""

    def task_state(self) -> State:
        """State that the hooks of a fit gather, in addition to the trained tensors."""

    def load_task_state(self, state: State) -> None:
        """Restores what `task_state` returned."""


class BestWeights:
    """Early stopping: a copy of the trained tensors at their best validation score so far."""

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float]) -> None:
        self.parameters, self.validate = parameters, validate
        self.score = float("-inf")
        self.copy = [parameter.detach().clone() for parameter in parameters]

    def update(self) -> float:
        """Validates and returns the score; copies the tensors if it is strictly better than the best so far."""
        score = self.validate()
        if score > self.score:
            self.score = score
            copy_values(self.parameters, self.copy)
        return score

    def restore(self) -> None:
        """Sets the trained tensors to their best values."""
        copy_values(self.copy, self.parameters)


class FitState:
    """Progress of one fit: the trained tensors, their optimizer, and the position in the batch plan.

    `epoch` counts finished epochs; `step` and `seen` count steps of the plan and examples of the current epoch. `total`
    is the sum of its losses, and `finite` the number of steps before the first NaN or infinite loss. `inserted` counts
    the steps of the fit that are not in the plan.
    """

    def __init__(
        self,
        stage: str,
        named: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        best: BestWeights | None,
        device: torch.device,
    ) -> None:
        self.stage, self.named, self.optimizer, self.best = stage, named, optimizer, best
        self.parameters = list(named.values())
        # Tensors on the device: reading the loss as a number at every step would make the CPU wait for the GPU.
        self.total, self.finite = torch.zeros((), device=device), torch.zeros((), device=device)
        self.epoch = self.step = self.seen = self.inserted = 0

    def count(self, examples: int, planned: bool) -> None:
        """Counts a step, of the plan or an inserted one."""
        self.step += planned
        self.inserted += not planned
        self.seen += examples

    def next_epoch(self) -> None:
        """Starts the next epoch with all counts of an epoch at zero."""
        self.epoch += 1
        self.step = self.seen = 0
        self.total, self.finite = torch.zeros_like(self.total), torch.zeros_like(self.finite)

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a step to the total of the epoch."""
        self.total += loss
        self.finite += torch.isfinite(self.total)  # once a loss is NaN or infinite, the total stays so

    def state(self) -> ProgressRecord:
        """Returns the progress without the trained tensors."""
        state: ProgressRecord = {
            "epoch": self.epoch,
            "step": self.step,
            "seen": self.seen,
            "total": self.total,
            "finite": self.finite,
            "best": {"score": self.best.score, "copy": self.best.copy} if self.best else None,
            "optimizer": self.optimizer.moments(),
        }
        return {**state, "inserted": self.inserted} if self.inserted else state

    def load(self, state: ProgressRecord) -> None:
        """Restores what `state` returned."""
        self.epoch, self.step, self.seen = state["epoch"], state["step"], state["seen"]
        self.inserted = state.get("inserted", 0)
        self.total.copy_(state["total"])
        self.finite.copy_(state["finite"])
        if self.best and state["best"]:
            self.best.score = state["best"]["score"]
            copy_values(state["best"]["copy"], self.best.copy)
        self.optimizer.load_moments(state["optimizer"])


class FitCheckpointer:
    """Collects the states of a task's fits and writes them every `minutes`, and when a signal arrives.

    `write` of `start_task` gets a number, which grows from state to state of the task, and the record of all fits.
    Without it, as in a dry run, nothing is written.
    """

    def __init__(
        self, method: Learner | None = None, minutes: float = math.inf, shutdown: GracefulShutdown | None = None
    ) -> None:
        self.method, self.seconds, self.shutdown = method, 60 * minutes, shutdown or GracefulShutdown()
        self.shutdown.save = self.save_pending
        self.start_task(None, None)
        self.mark_saved()

    def start_task(self, record: State | None, write: Write | None) -> None:
        """Starts a task; `record` is what was written of it before the run was stopped."""
        self.write = write
        self.loaded_fits = list(cast(list[FitRecord], record["fits"])) if record else []
        self.finished_fits: list[FinishedFit] = []
        self.finished_steps = 0
        self.unsaved = False  # whether a fit has finished since the last write

    @contextlib.contextmanager
    def task_boundary(self) -> Iterator[None]:
        """The checkpoint after a task is written in this block; afterwards nothing of the task remains to be saved."""
        with self.shutdown.deferred():
            yield
            self.start_task(None, None)
            self.mark_saved()

    def mark_saved(self) -> None:
        """Restarts the timer: the next checkpoint is due in `minutes`."""
        self.due_at = time.monotonic() + self.seconds

    def requests(self) -> tuple[bool, ...]:
        """What this rank asks of all ranks: to save, as its timer says, and to stop, for each of SIGNALS."""
        signum = self.shutdown.pending_signal
        return time.monotonic() >= self.due_at, *(signum == number for number in SIGNALS)

    def should_save(self) -> bool:
        """Whether to write after a step, for the timer or a signal: a signal to one rank stops all."""
        return self._granted(get_world().agreed(self.requests()))

    def _granted(self, requests: Sequence[bool]) -> bool:
        """Whether any rank asks to save; also takes over the signal of another rank."""
        if self.write is None:
            return False
        for number, received in zip(SIGNALS, requests[1:], strict=False):
            if received:
                self.shutdown.pending_signal = int(number)
        return any(requests)

    def method_state_ahead(self) -> State | None:
        """What a stopped run saved of the method in the next fit of the task; None if the fit is new."""
        return self.loaded_fits[0]["method"] if self.loaded_fits else None

    def resume(self, parameters: list[nn.Parameter]) -> FitRecord | None:
        """Restores tensors, method, random state and costs of the next fit and returns its state; None if it is new."""
        if not self.loaded_fits:
            return None
        assert self.method
        state = self.loaded_fits.pop(0)
        copy_values(state["trained"], parameters)
        self.method.load_task_state(state["method"])
        random_states, index = [state["random"], *state.get("ranks", [])], get_world().index
        if index < len(random_states):  # a run that had fewer ranks has no random state for this one
            set_random_state(random_states[index], self.method.objective.device)
        self.method.objective.meter.load(state["cost"])
        return state

    def save(self, fit: FitState, done: int) -> None:
        """Writes the task in the middle of a fit, after `done` of its steps."""
        unfinished: UnfinishedFit = {**self._common(fit.parameters), **fit.state()}
        self._write(self.finished_steps + done, [*self.finished_fits, unfinished])

    def finish(self, parameters: list[nn.Parameter], steps: int, history: StageHistory) -> None:
        """Records the end of a fit of `steps` steps; `history` is what the trainer needs of it later."""
        if self.write is None:
            return
        finished: FinishedFit = {**self._common(parameters), "over": history}
        self.record_finished(cpu_copy(finished), steps)
        self.unsaved = True
        if self._granted([bool(number) for number in get_world().all_reduce_max(*self.requests())]):
            self.save_pending()

    def record_finished(self, state: FinishedFit, steps: int) -> None:
        """Appends the state of a finished fit."""
        self.finished_fits.append(state)
        # One more than its steps: a finished fit is a later state than the same fit after its last step.
        self.finished_steps += steps + 1

    def save_pending(self) -> None:
        """Writes the finished fits, if one of them is not written yet."""
        if self.write is not None and self.unsaved:
            self._write(self.finished_steps, self.finished_fits)

    def _write(self, number: int, fits: Sequence[FitRecord]) -> None:
        assert self.write
        self.write(number, cast(State, {"fits": fits}))
        self.unsaved = False
        self.mark_saved()

    def _common(self, parameters: list[nn.Parameter]) -> CommonRecord:
        """The state that finished and unfinished fits share. All ranks must call this: it gathers."""
        assert self.method
        objective = self.method.objective
        main_state, *other_states = get_world().gather(random_state(objective.device))
        common: CommonRecord = {
            "trained": parameters,
            "method": self.method.task_state(),
            "random": main_state,
            "cost": objective.meter.state(),
        }
        if other_states:
            common["ranks"] = other_states
        return common


@torch.no_grad()
def copy_values(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies `values` into `tensors`, in place, whether they are sharded or not."""
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(aligned(value, tensor))


def random_state(device: torch.device) -> RandomState:
    """Returns the state of every global random generator: torch, Python, NumPy, and CUDA on a GPU."""
    name, keys, *rest = cast(LegacyState, np.random.get_state())
    numpy = cast(NumpyState, (name, keys.tolist(), *rest))
    states: RandomState = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, key, gauss = state["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(cast(LegacyState, tuple(state["numpy"])))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
