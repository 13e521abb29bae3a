"""Trainer.fit: the one training loop, whatever the method."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config import Schedule, Select, Training, derive, require
from clpet.errors import HostError
from clpet.mixing import Plan
from clpet.objectives.base import Objective
from clpet.text import Batch


class Device(Enum):
    """Where the network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    """Precision of the frozen backbone; adapters and heads are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class Hardware:
    """A hardware group option. Nothing here changes what a run means, only how it is carried out."""

    name: str = "auto"
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    micro_batch_size: int | None = None
    eval_batch_size: int = 128
    threads: int | None = None

    def __post_init__(self) -> None:
        size = self.micro_batch_size
        require(size is None or size >= 1, "hardware.micro_batch_size", size, "at least 1, or null")
        require(self.eval_batch_size >= 1, "hardware.eval_batch_size", self.eval_batch_size, "at least 1")
        require(self.threads is None or self.threads >= 1, "hardware.threads", self.threads, "at least 1, or null")
        if self.device is Device.cuda and not torch.cuda.is_available():
            raise HostError("hardware.device=cuda, but this machine has no CUDA device: use hardware=cpu or auto")
        if self.threads:
            torch.set_num_threads(self.threads)

    @property
    def torch_device(self) -> torch.device:
        """The device that `auto` stands for here."""
        wanted = self.device.value
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)

    @property
    def torch_dtype(self) -> torch.dtype:
        """bf16 where the device computes in it, else fp32."""
        if self.dtype is Dtype.auto:
            cuda = self.torch_device.type == "cuda"
            fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_has_bf16()
            return torch.bfloat16 if fast else torch.float32
        return torch.bfloat16 if self.dtype is Dtype.bf16 else torch.float32


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


class Progress(Protocol):
    """What shows how a fit goes on."""

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """A fit begins."""

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        """A step is done; `loss` is the running mean, still on the device."""

    def validated(self, epoch: int, score: float) -> None:
        """An epoch's validation score."""


class Trainer:
    """Fits parameters on a plan's batches; fresh optimiser and schedule in every fit."""

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
        self.task = 0
        self.trial = False  # one backward pass, no step

    def begin_task(self, index: int) -> None:
        """Seeds torch for a task, so that a resumed run draws what an uninterrupted one draws; starts its meter."""
        self.task = index
        torch.manual_seed(derive(self.seed, "task", self.objective.benchmark.key(index)))
        self.objective.meter.restart()

    def rows(self, plan: Plan) -> np.ndarray:
        """The distinct rows of a plan's pool that a fit goes through, for what has to be done to them before."""
        epochs = [plan.epoch(0)[:1]] if self.trial else map(plan.epoch, range(self.settings.epochs))
        return np.unique(np.concatenate([part for epoch in epochs for part in epoch]))

    def fit(
        self,
        plan: Plan,
        loss: Callable[[Batch], Tensor],
        parameters: Iterable[nn.Parameter],
        *,
        stage: str = "",
        clip: float | None = None,
        validate: Callable[[], float] | None = None,
        adjust_gradients: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Minimises `loss`, the mean over a batch, for the configured number of epochs.

        With train.select=best, `validate` (higher is better) is called before and after every epoch and the
        best state of `parameters` is kept; without a strictly better epoch the first state stays.
        Raises HostError when the loss is no longer finite.
        """
        settings, parameters = self.settings, list(parameters)
        optimizer = self._optimizer(parameters)
        scheduler = self._scheduler(optimizer, plan.steps * settings.epochs)
        clip = settings.clip if clip is None else clip
        best = _Best(parameters, validate) if validate and settings.select is Select.best else None
        self.progress.fit(stage, settings.epochs, plan.steps)
        if self.trial:
            self._backward(plan, plan.epoch(0)[0], loss, parameters)
            return
        for epoch in range(settings.epochs):
            self.objective.adapters.train_mode(True)
            total, seen = torch.zeros((), device=self.hardware.torch_device), 0
            for step, rows in enumerate(plan.epoch(epoch)):
                total += self._backward(plan, rows, loss, parameters)
                if adjust_gradients:
                    adjust_gradients()
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                scheduler.step()
                if after_step:
                    after_step()
                optimizer.zero_grad(set_to_none=True)
                seen += len(rows)
                self.progress.step(epoch, step + 1, seen, total / (step + 1))
            self.objective.adapters.train_mode(False)
            if not torch.isfinite(total):
                where = f"task {self.task + 1}{stage and f' ({stage})'}"
                raise HostError(
                    f"the loss of {where} is {total.item()} in epoch {epoch + 1}: "
                    "lower train.lr or set train.clip; the tasks before it are saved"
                )
            if best:
                self.progress.validated(epoch + 1, best.update())
        if best:
            best.restore()

    def _backward(
        self, plan: Plan, rows: Any, loss: Callable[[Batch], Tensor], parameters: list[nn.Parameter]
    ) -> Tensor:
        """Gradients of the batch's mean loss over all its terms, in micro-batches; returns that mean, detached."""
        full = plan.pool.weights[rows].sum()
        if plan.keep is not None:
            rows = rows[plan.keep(rows)]
        if len(rows) == 0:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        size = self.hardware.micro_batch_size or max(1, len(rows))
        mean = torch.zeros((), device=self.hardware.torch_device)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = plan.pool.batch(part, self.hardware.torch_device)
            batch.share = float(plan.pool.weights[part].sum() / full)
            value = loss(batch) * batch.share
            value.backward()
            mean += value.detach()
        return mean

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        s = self.settings
        lr, betas = s.lr_of(self.task), (s.betas[0], s.betas[1])
        return torch.optim.AdamW(
            parameters, lr=lr, betas=betas, eps=s.eps, weight_decay=s.weight_decay, fused=bool(parameters)
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.settings.schedule is Schedule.constant else self.settings.schedule.value
        return get_scheduler(
            name, optimizer, num_warmup_steps=self.settings.warmup_steps, num_training_steps=max(1, steps)
        )


class _Best:
    """A copy of the trained tensors at their best validation score."""

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float]) -> None:
        self.parameters, self.validate = parameters, validate
        self.score = validate()
        self.copy = [parameter.detach().clone() for parameter in parameters]

    def update(self) -> float:
        score = self.validate()
        if score > self.score:
            self.score = score
            for held, parameter in zip(self.copy, self.parameters, strict=True):
                held.copy_(parameter.detach())
        return score

    def restore(self) -> None:
        with torch.no_grad():
            for held, parameter in zip(self.copy, self.parameters, strict=True):
                parameter.copy_(held)


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
