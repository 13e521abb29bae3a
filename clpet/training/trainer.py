"""Trainer.fit: the one training loop that all methods use."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import OnNan, OptimizerState, Select, Training
from clpet.config.seeding import derive
from clpet.errors import HostError, enough_memory
from clpet.objectives.base import Objective
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.runtime.kernels import offloaded, tf32
from clpet.runtime.sharding.gradients import all_finite, clip_grad_norm_
from clpet.training.fit_checkpoint import BestWeights, FitCheckpointer, FitState
from clpet.training.fit_record import StageHistory
from clpet.training.lr_schedules import SchedulePosition, schedule, warmup, warn_of_warmup
from clpet.training.optimizers import Optimizer, same_shape
from clpet.training.progress import Progress
from clpet.training.step import StepContext, StepHooks
from clpet.training.step_log import StepLog

log = logging.getLogger(__name__)


class Trainer:
    """Trains parameters on the batches of a plan. Every fit has a new optimiser, which may inherit moments."""

    dry_run = False  # True: only a few steps of every fit are made (clpet/training/rehearsal.py)

    def __init__(
        self,
        settings: Training,
        hardware: Hardware,
        objective: Objective,
        progress: Progress,
        seed: int,
        checkpointer: FitCheckpointer | None = None,
    ) -> None:
        self.settings, self.hardware, self.objective = settings, hardware, objective
        self.progress, self.seed = progress, seed
        self.checkpointer, self.step_log = checkpointer or FitCheckpointer(), StepLog(settings.log_every)
        self.task, self.last = 0, False
        self.stage_history: dict[str, StageHistory] = {}

    def begin_task(self, index: int, last: bool = False) -> None:
        """Seeds torch for a task and starts its cost meter.

        The seed depends on the task alone, so a resumed run draws the same numbers as an uninterrupted one.
        """
        self.task, self.last = index, last
        torch.manual_seed(derive(self.seed, "task", self.objective.benchmark.seed_key(index)))
        self.objective.meter.restart()
        self.objective.flops.renew()  # a task after a loaded state counts the same operations as one after another

    @property
    def epochs(self) -> int:
        """Number of epochs of a fit in the current task."""
        return self.settings.epochs_of(self.task)

    @contextlib.contextmanager
    def using(self, epochs: int | None = None, lr: float | None = None) -> Iterator[None]:
        """Fits inside this block use the given values instead of train.epochs and train.lr."""
        configured = self.settings
        self.settings = dataclasses.replace(
            configured, epochs=configured.epochs if epochs is None else epochs, lr=configured.lr if lr is None else lr
        )
        try:
            yield
        finally:
            self.settings = configured

    def rows(self, plan: BatchPlan) -> np.ndarray:
        """Returns the distinct rows that a fit on this plan trains on, for methods that precompute values of them."""
        epochs = map(plan.epoch, range(self.epochs))
        return np.unique(np.concatenate([batch for epoch in epochs for batch in epoch]))

    def fit(
        self,
        plan: BatchPlan,
        parameters: Mapping[str, nn.Parameter],
        hooks: StepHooks,
        *,
        stage: str = "",
        clip: float | None = None,
    ) -> None:
        """Minimises `hooks.loss` plus `hooks.step_loss` for train.epochs epochs.

        `parameters` are trained. With train.optimizer_state=carry, an equal name in an earlier fit of the same stage
        means the same tensor, which keeps its moments. With train.select=best, `hooks.validate` is called before the
        first and after every epoch, and the parameters end at their best values; without a strictly better epoch they
        end as they were. `clip` replaces train.clip. Raises HostError if the loss is NaN or infinite.
        """
        self.progress.fit(stage, self.epochs, plan.steps)
        self.objective.flops.renew()
        clip = self.settings.clip if clip is None else clip
        with self.checkpointer.shutdown.deferred(), enough_memory(self._memory_hint):
            fit = self._begin(plan, parameters, stage, hooks.validate)
            if fit is not None:
                self._train(plan, fit, hooks, partial(self._step, plan, hooks, clip, fit))
                self._end(plan, fit)

    def _train(
        self, plan: BatchPlan, fit: FitState, hooks: StepHooks, step: Callable[[np.ndarray, float, bool], None]
    ) -> None:
        """Runs the remaining steps of a fit.

        `step` gets the rows of a batch, the learning rate, and whether the batch is one of the plan.
        """
        position = self._position(plan, fit.stage)
        warn_of_warmup(self.settings, position, fit.stage)
        rate = schedule(self.settings, self.settings.lr_of(self.task), position)
        remaining = plan.steps * self.epochs - (fit.epoch * plan.steps + fit.step)
        self.step_log.start_fit(fit.stage, self.objective.meter.cost.steps, remaining)
        for epoch in range(fit.epoch, self.epochs):
            self.objective.adapters.train_mode(True)
            for rows, planned in hooks.interleaved(plan.epoch(epoch)[fit.step :]):
                step(rows, rate(plan.clock(epoch * plan.steps + fit.step)), planned)
                if planned:
                    self.progress.step(epoch, fit.step, fit.seen, fit.total / fit.finite.clamp(min=1))
                if self.checkpointer.should_save():
                    self._raise_if_not_finite(fit)  # a checkpoint must never contain broken weights
                    self.step_log.flush()  # a resumed run takes the steps before the checkpoint as recorded
                    self.checkpointer.save(fit, epoch * plan.steps + fit.step + fit.inserted)
                    self.checkpointer.shutdown.exit_if_requested()
            self.objective.adapters.train_mode(False)
            self._raise_if_not_finite(fit)
            if fit.best:
                score = fit.best.update()
                self.progress.validated(epoch + 1, score)
                self.step_log.validated(epoch + 1, score)
            fit.next_epoch()

    def _step(
        self, plan: BatchPlan, hooks: StepHooks, clip: float, fit: FitState, rows: np.ndarray, lr: float, planned: bool
    ) -> None:
        if not planned:
            self.step_log.expect_another()
        context = StepContext(self.task, fit.stage, fit.epoch, fit.step, rows, plan.pool)
        if hooks.before_step:
            hooks.before_step(context)
        mean = self._backward(plan, context, hooks, fit.parameters)
        if hooks.adjust_gradients:
            hooks.adjust_gradients(context)
        self.step_log.step(context, lr, mean, fit.parameters)
        if self._clip_and_check(fit, mean, clip):
            fit.optimizer.step(lr)
            if hooks.after_step:
                hooks.after_step(context)
        fit.optimizer.zero_grad()
        if hooks.end_step:
            hooks.end_step(context)
        fit.count(len(rows), planned)
        self.objective.meter.cost.steps += 1

    def _memory_hint(self) -> str:
        """The size of the pass that ran out of memory, and the option that lowers it."""
        if self.objective.meter.kind == "validated":
            return self.objective.memory_advice()
        per_rank = -(-self.settings.global_batch_size // get_world().size)
        if tokens := self.hardware.max_tokens:
            return f"up to {tokens} tokens in a training pass: lower hardware.max_tokens (it changes no result)"
        size = min(per_rank, self.hardware.micro_batch_size or per_rank)
        return f"{size} examples in a training pass: lower hardware.micro_batch_size (it changes no result)"

    def _position(self, plan: BatchPlan, stage: str) -> SchedulePosition:
        history = self.stage_history.get(stage, StageHistory(steps=0, warmup=0))
        return SchedulePosition(plan.clock(plan.steps * self.epochs), history["steps"], history["warmup"], self.last)

    def _begin(
        self, plan: BatchPlan, named: Mapping[str, nn.Parameter], stage: str, validate: Callable[[], float] | None
    ) -> FitState | None:
        """Returns a new fit, or the one that a stopped run left unfinished; None if the stopped run had finished it."""
        if get_world().size > 1:  # dropout must differ from rank to rank
            torch.manual_seed(derive(self.seed, "rank", get_world().index, self.task, stage))
        parameters = list(named.values())
        saved = self.checkpointer.resume(parameters)
        if saved and "over" in saved:
            self.stage_history[stage] = saved["over"]
            self.checkpointer.record_finished(saved, plan.steps * self.epochs + saved["over"].get("inserted", 0))
            return None
        best = BestWeights(parameters, validate) if validate and self.settings.select is Select.best else None
        fit = FitState(stage, named, Optimizer(named, self.settings), best, self.hardware.torch_device)
        if saved:
            fit.load(saved)
            self.progress.resumed(fit.epoch * plan.steps + fit.step, fit.seen)
        else:
            self._carry_moments(fit)
            if best:
                best.update()
        return fit

    def _carry_moments(self, fit: FitState) -> None:
        """Copies the optimiser's moments from the last fit of this stage, for tensors of the same name and shape."""
        history = self.stage_history.get(fit.stage)
        carried = history.get("moments", {}) if history else {}
        states = [same_shape(parameter, carried.get(name, {})) for name, parameter in fit.named.items()]
        if any(states):
            fit.optimizer.load_moments(states)
        elif carried:
            log.warning(
                "task %d: train.optimizer_state=carry has no effect: all trained tensors are new or have another shape",
                self.task + 1,
            )

    def _end(self, plan: BatchPlan, fit: FitState) -> None:
        """Restores the best weights, and stores what later tasks and a resumed run need of this fit."""
        self.step_log.flush()
        if fit.best:
            fit.best.restore()
        position = self._position(plan, fit.stage)
        history: StageHistory = {
            "steps": position.done + position.steps,
            "warmup": position.warmed + warmup(self.settings, position),
        }
        if fit.inserted:
            history["inserted"] = fit.inserted
        if self.settings.optimizer_state is OptimizerState.carry:
            history["moments"] = dict(zip(fit.named, fit.optimizer.moments(), strict=True))
        self.stage_history[fit.stage] = history
        self.checkpointer.finish(fit.parameters, plan.steps * self.epochs + fit.inserted, history)

    def _clip_and_check(self, fit: FitState, mean: Tensor, clip: float) -> bool:
        """Clips the gradients, adds the loss to the epoch's total, and returns whether to update the parameters.

        Values are read here only with train.on_nan=skip or on the CPU: on a GPU each read waits for the device.
        """
        skip = self.settings.on_nan is OnNan.skip
        norm = clip_grad_norm_(fit.parameters, clip or math.inf) if clip or skip else mean
        if skip and not bool(torch.isfinite(mean + norm)):
            if not self.objective.meter.cost.skipped_steps:
                step = self._describe_step(fit, fit.step + 1)
                log.warning("%s: the loss or its gradient is NaN or infinite, the step is skipped", step)
            self.objective.meter.cost.skipped_steps += 1
            return False
        fit.add(mean)
        if self.hardware.torch_device.type == "cpu":
            self._raise_if_not_finite(fit, weights=False)
        return True

    def _raise_if_not_finite(self, fit: FitState, weights: bool = True) -> None:
        """Raises HostError if a loss of the epoch, or with `weights` a trained tensor, is NaN or infinite."""
        advice = "lower train.lr, set train.clip, or use train.on_nan=skip; earlier checkpoints are kept"
        if not torch.isfinite(fit.total):
            self.step_log.flush()
            step = self._describe_step(fit, int(fit.finite) + 1)
            raise HostError(f"the loss of {step} is {fit.total.item()}: {advice}")
        if weights and not all_finite(fit.parameters):
            raise HostError(f"the weights of {self._describe_step(fit, fit.step)} are NaN or infinite: {advice}")

    def _describe_step(self, fit: FitState, step: int) -> str:
        return f"task {self.task + 1}{fit.stage and f' ({fit.stage})'} in epoch {fit.epoch + 1}, step {step}"

    def _backward(
        self, plan: BatchPlan, context: StepContext, hooks: StepHooks, parameters: list[nn.Parameter]
    ) -> Tensor:
        """Computes the gradients of a step's loss in micro-batches, and returns that loss, detached.

        Each rank computes its rows of the batch; gradients and loss are then summed over ranks. A micro-batch counts by
        its share of the batch's total weight, so the result does not depend on how the batch is divided.
        """
        rows = context.rows
        total_weight = plan.pool.weights[rows].sum()  # of all rows: those without a gradient count in the mean
        if plan.gradient_mask is not None:
            rows = rows[plan.gradient_mask(rows)]
        if len(rows) == 0:  # unlike no gradient, a zero one lets AdamW decay moments and weights, as in a full batch
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        mean = torch.zeros((), device=self.hardware.torch_device)
        with get_world().local_only():
            divide = partial(self.objective.micro_batches.divide, plan.pool)
            for micro_rows, counts in get_world().micro_batches(rows, divide):
                share = float(plan.pool.weights[micro_rows].sum() / total_weight)
                batch = dataclasses.replace(plan.pool.batch(micro_rows, self.hardware.torch_device), share=share)
                context.micro_batch, context.counts = batch, counts
                with tf32(self.hardware.torch_device, self.hardware.torch_dtype):
                    with self._saving():
                        value = hooks.loss(context) * (batch.share if counts else 0.0)
                    value.backward()
                mean += value.detach()
            context.micro_batch, context.counts = None, True
            if get_world().mesh is None:
                self._add_step_loss(context, hooks, mean)
        get_world().sum_gradients(parameters, mean, self.checkpointer.requests())
        if get_world().mesh is not None:
            self._add_step_loss(context, hooks, mean)
        return mean

    def _saving(self) -> contextlib.AbstractContextManager[None]:
        """Where a forward pass keeps what its backward pass needs."""
        model = self.objective.adapters.model
        return offloaded(model.parameters()) if self.hardware.offload else contextlib.nullcontext()

    def _add_step_loss(self, context: StepContext, hooks: StepHooks, mean: Tensor) -> None:
        """Adds the term that a step has once, and its gradients, on the main rank alone: ranks are summed afterwards.

        It has a backward pass of its own after those of the micro-batches. The ranks of a sharded backbone all compute
        it, because the term might run the network, which they can only do together. If its weights are trained, each
        rank computes the gradients of its rows, after the sum.
        """
        counts = get_world().is_main or get_world().mesh is not None
        if hooks.step_loss is None or not (counts or get_world().sharded):
            return
        value = hooks.step_loss(context)
        if value is not None:
            value = value if counts else value * 0.0
            value.backward()
            mean += value.detach()

    def state(self) -> State:
        """Returns what the fits of later tasks need."""
        return cast(State, self.stage_history)

    def load(self, state: State) -> None:
        """Restores what `state` returned."""
        self.stage_history = dict(cast(dict[str, StageHistory], state))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the progress bars and advice of transformers and huggingface_hub in a block."""
    import huggingface_hub
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hub, library = huggingface_hub.logging, transformers.logging
    levels, bars = (hub.get_verbosity(), library.get_verbosity()), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        hub.set_verbosity(levels[0])
        library.set_verbosity(levels[1])
        if bars:
            library.enable_progress_bar()
