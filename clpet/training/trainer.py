"""Trainer.fit: the one training loop, whatever the method."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import OnNan, OptimizerState, Select, Training
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.errors import HostError, enough_memory
from clpet.objectives.base import Objective
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.training.fit_checkpoint import BestWeights, FitCheckpointer, FitState, load_moments, moments
from clpet.training.lr_schedules import SchedulePosition, schedule, warmup, warn_of_warmup

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What shows how a fit goes on."""

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """A fit begins."""

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        """A step is done; `loss` is the running mean, still on the device."""

    def resumed(self, steps: int, examples: int) -> None:
        """The fit goes on after so many steps, with so many examples of its present epoch behind it."""

    def validated(self, epoch: int, score: float) -> None:
        """An epoch's validation score."""


class Trainer:
    """Fits parameters on a plan's batches; a fresh optimiser in every fit, save for the moments it may carry over."""

    def __init__(
        self,
        settings: Training,
        hardware: Hardware,
        objective: Objective,
        progress: Progress,
        seed: int,
    ) -> None:
        self.settings, self.hardware, self.objective = settings, hardware, objective
        self.progress, self.seed = progress, seed
        self.task, self.last = 0, False
        self.dry_run = False  # one backward pass, no step
        self.checkpointer = FitCheckpointer()
        self.stage_history: dict[
            str, dict[str, Any]
        ] = {}  # by stage: steps and warm-up steps so far, and moments to carry

    def begin_task(self, index: int, last: bool = False) -> None:
        """Seeds torch for a task, so that a resumed run draws what an uninterrupted one draws; starts its meter."""
        self.task, self.last = index, last
        torch.manual_seed(derive(self.seed, "task", self.objective.benchmark.seed_key(index)))
        self.objective.meter.restart()

    @property
    def epochs(self) -> int:
        """Passes of a fit of the present task."""
        return self.settings.epochs_of(self.task)

    @contextlib.contextmanager
    def using(self, epochs: int | None = None, lr: float | None = None) -> Iterator[None]:
        """Fits inside take these in position of train.epochs and train.lr, where they are given."""
        configured = self.settings
        changes: dict[str, Any] = {key: value for key, value in (("epochs", epochs), ("lr", lr)) if value is not None}
        self.settings = dataclasses.replace(configured, **changes)
        try:
            yield
        finally:
            self.settings = configured

    def rows(self, plan: BatchPlan) -> np.ndarray:
        """The distinct rows of a plan's pool that a fit goes through, for what has to be done to them before."""
        epochs = [plan.epoch(0)[:1]] if self.dry_run else map(plan.epoch, range(self.epochs))
        return np.unique(np.concatenate([part for epoch in epochs for part in epoch]))

    def fit(
        self,
        plan: BatchPlan,
        loss: Callable[[Batch], Tensor],
        parameters: Mapping[str, nn.Parameter],
        *,
        stage: str = "",
        clip: float | None = None,
        validate: Callable[[], float] | None = None,
        before_step: Callable[[np.ndarray], None] | None = None,
        adjust_gradients: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Minimises `loss`, the mean over a batch, for the configured number of epochs.

        `parameters` are those to train; where AdamW's moments are carried over, a name of an earlier fit of the same
        stage stands for the same tensor.

        With train.select=best, `validate` (higher is better) is called before and after every epoch and the
        best state of `parameters` is kept; without a strictly better epoch the first state stays.
        `before_step` gets the rows of every whole batch before any part of it is computed; `adjust_gradients` comes
        before every update, `after_step` after every one that is not left out, `after_batch` at the end of every step.
        Raises HostError when the loss is no longer finite.
        """
        settings = self.settings
        clip = settings.clip if clip is None else clip
        step = partial(self._step, plan, loss, clip, before_step, adjust_gradients, after_step, after_batch)
        self.progress.fit(stage, self.epochs, plan.steps)
        if self.dry_run:
            if before_step:
                before_step(plan.epoch(0)[0])
            self._backward(plan, plan.epoch(0)[0], loss, list(parameters.values()))
            return
        with self.checkpointer.shutdown.deferred(), enough_memory(self._memory_hint):
            fit = self._begin(plan, parameters, stage, validate)
            if fit is None:
                return
            position = self._position(plan, stage)
            warn_of_warmup(settings, position, stage)
            rate = schedule(settings, settings.lr_of(self.task), position)
            for epoch in range(fit.epoch, self.epochs):
                self.objective.adapters.train_mode(True)
                for rows in plan.epoch(epoch)[fit.step :]:
                    step(fit, rows, rate(plan.clock(epoch * plan.steps + fit.step)))
                    self.progress.step(epoch, fit.step, fit.seen, fit.total / fit.step)
                    if self.checkpointer.should_save():
                        self._raise_if_not_finite(fit)
                        self.checkpointer.save(fit, epoch * plan.steps + fit.step)
                        self.checkpointer.shutdown.exit_if_requested()
                self.objective.adapters.train_mode(False)
                self._raise_if_not_finite(fit)
                if fit.best:
                    self.progress.validated(epoch + 1, fit.best.update())
                fit.next_epoch()
            self._end(plan, fit)

    def _step(
        self,
        plan: BatchPlan,
        loss: Callable[[Batch], Tensor],
        clip: float,
        before_step: Callable[[np.ndarray], None] | None,
        adjust_gradients: Callable[[], None] | None,
        after_step: Callable[[], None] | None,
        after_batch: Callable[[], None] | None,
        fit: FitState,
        rows: np.ndarray,
        lr: float,
    ) -> None:
        if before_step:
            before_step(rows)
        mean = self._backward(plan, rows, loss, fit.parameters)
        if adjust_gradients:
            adjust_gradients()
        if self._clip_and_check(fit, mean, clip):
            for group in fit.optimizer.param_groups:
                group["lr"] = lr
            fit.optimizer.step()
            if after_step:
                after_step()
        fit.optimizer.zero_grad(set_to_none=True)
        if after_batch:
            after_batch()
        fit.step, fit.seen = fit.step + 1, fit.seen + len(rows)

    def _memory_hint(self) -> str:
        if self.objective.meter.kind == "validated":
            return self.objective.memory_advice()
        whole = -(-self.settings.global_batch_size // get_world().size)
        size = min(whole, self.hardware.micro_batch_size or whole)
        return f"{size} examples in a training pass: lower hardware.micro_batch_size (it changes no result)"

    def _position(self, plan: BatchPlan, stage: str) -> SchedulePosition:
        past = self.stage_history.get(stage, {"steps": 0, "warmup": 0})
        return SchedulePosition(plan.clock(plan.steps * self.epochs), past["steps"], past["warmup"], self.last)

    def _begin(
        self, plan: BatchPlan, named: Mapping[str, nn.Parameter], stage: str, validate: Callable[[], float] | None
    ) -> FitState | None:
        """The fit from its start, or from where a run was cut off; None if it was over then."""
        if get_world().size > 1:  # dropout is another one on every rank
            torch.manual_seed(derive(self.seed, "rank", get_world().index, self.task, stage))
        parameters = list(named.values())
        saved = self.checkpointer.resume(parameters)
        if saved and "over" in saved:
            self.stage_history[stage] = saved["over"]
            self.checkpointer.record_finished(saved, plan.steps * self.epochs)
            return None
        best = BestWeights(parameters, validate) if validate and self.settings.select is Select.best else None
        fit = FitState(stage, named, self._optimizer(parameters), best, self.hardware.torch_device)
        if saved:
            fit.load(saved)
            self.progress.resumed(fit.epoch * plan.steps + fit.step, fit.seen)
        else:
            self._carry(fit)
            if best:
                best.update()
        return fit

    def _carry(self, fit: FitState) -> None:
        """Gives tensors that an earlier fit of this stage trained, and that kept their shape, their moments."""
        carried = self.stage_history.get(fit.stage, {}).get("moments", {})
        found = [moments_of(parameter, carried.get(name, {})) for name, parameter in fit.named.items()]
        if any(found):
            load_moments(fit.optimizer, found)
        elif carried:
            none = "task %d: train.optimizer_state=carry carries nothing: all trained tensors are new or have grown"
            log.warning(none, self.task + 1)

    def _end(self, plan: BatchPlan, fit: FitState) -> None:
        """What later tasks and a resumed run need of a fit that is over."""
        if fit.best:
            fit.best.restore()
        position = self._position(plan, fit.stage)
        past: dict[str, Any] = {
            "steps": position.done + position.steps,
            "warmup": position.warmed + warmup(self.settings, position),
        }
        if self.settings.optimizer_state is OptimizerState.carry:
            past["moments"] = dict(zip(fit.named, moments(fit.optimizer), strict=True))
        self.stage_history[fit.stage] = past
        self.checkpointer.finish(fit.parameters, plan.steps * self.epochs, past)

    def _clip_and_check(self, fit: FitState, mean: Tensor, clip: float) -> bool:
        """Clips, counts the loss and says whether to take the step. Only with on_nan=skip it waits for the device."""
        skip = self.settings.on_nan is OnNan.skip
        norm = nn.utils.clip_grad_norm_(fit.parameters, clip or math.inf) if clip or skip else mean
        if skip and not bool(torch.isfinite(mean + norm)):
            if not self.objective.meter.cost.skipped_steps:
                log.warning(
                    "%s: the loss or its gradient is no number, the step is left out",
                    self._describe_step(fit, fit.step + 1),
                )
            self.objective.meter.cost.skipped_steps += 1
            return False
        fit.add(mean)
        if self.hardware.torch_device.type == "cpu":
            self._raise_if_not_finite(fit, weights=False)
        return True

    def _raise_if_not_finite(self, fit: FitState, weights: bool = True) -> None:
        """Raises HostError where a loss of the epoch or a trained tensor is not finite."""
        advice = "lower train.lr, set train.clip or take train.on_nan=skip; what was saved before is kept"
        if not torch.isfinite(fit.total):
            where = self._describe_step(fit, int(fit.finite) + 1)
            raise HostError(f"the loss of {where} is {fit.total.item()}: {advice}")
        if weights and fit.parameters and not torch.stack([value.isfinite().all() for value in fit.parameters]).all():
            raise HostError(f"the weights of {self._describe_step(fit, fit.step)} are no longer finite: {advice}")

    def _describe_step(self, fit: FitState, step: int) -> str:
        return f"task {self.task + 1}{fit.stage and f' ({fit.stage})'} in epoch {fit.epoch + 1}, step {step}"

    def _backward(
        self, plan: BatchPlan, rows: Any, loss: Callable[[Batch], Tensor], parameters: list[nn.Parameter]
    ) -> Tensor:
        """Gradients of the batch's mean loss over all its terms, in micro-batches; returns that mean, detached.

        Every rank computes its part of the batch; the gradients and the mean are those of all of it.
        """
        full = plan.pool.weights[rows].sum()
        if plan.gradient_mask is not None:
            rows = rows[plan.gradient_mask(rows)]
        if len(rows) == 0:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        mean = torch.zeros((), device=self.hardware.torch_device)
        with get_world().local_only():
            for part, counts in get_world().micro_batches(rows, self.hardware.micro_batch_size):
                batch = plan.pool.batch(part, self.hardware.torch_device)
                batch.share = float(plan.pool.weights[part].sum() / full)
                value = loss(batch) * (batch.share if counts else 0.0)
                value.backward()
                mean += value.detach()
        get_world().sum_gradients(parameters, mean)
        return mean

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        s = self.settings
        lr, betas = s.lr_of(self.task), (s.betas[0], s.betas[1])
        return torch.optim.AdamW(
            parameters, lr=lr, betas=betas, eps=s.eps, weight_decay=s.weight_decay, fused=bool(parameters)
        )

    def state(self) -> dict[str, Any]:
        """What later tasks need."""
        return self.stage_history

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.stage_history = dict(state)


def moments_of(parameter: Tensor, carried: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's moments of a tensor of the same name, none where the tensor has another shape now."""
    return carried if carried and carried["exp_avg"].shape == parameter.shape else {}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the libraries' own progress bars and advice off the screen."""
    import huggingface_hub
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    yield
