"""I-LoRA: a slow adapter follows the trained one and holds its hidden states back (Ren et al., 2024, arXiv 2402.18865).

From task 2 on, with hidden states h_F of the trained (fast) and h_S of the slow adapter on old examples,
    L = CE + weight C,   C = mean (relu(h_S - h_F))^2 (consistency=masked) or mean (h_S - h_F)^2 (mse)
over old examples, their tokens, the blocks and their units. After step k of a task, counted from 1,
    theta_S <- a theta_S + (1 - a) theta_F,   a = min(1 - 1 / (k + 1), keep)
The slow adapter starts as a copy of the fast one after task 1, and answers (answer=slow).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clpet.config.schema import require
from clpet.data.benchmark import Task
from clpet.errors import ConfigError, ModelError
from clpet.methods.components.subspace import mask_of
from clpet.methods.second_adapter import SecondAdapter
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.runtime.distributed import get_world
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

LAST = 3  # blocks of layers=last3


class Consistency(Enum):
    """masked: only units that are larger in the slow adapter are pulled; mse: all."""

    masked = "masked"
    mse = "mse"


class Layers(Enum):
    """Blocks whose outputs are compared."""

    all = "all"
    last3 = "last3"


class Answer(Enum):
    """The adapter that answers."""

    slow = "slow"
    fast = "fast"


@dataclass
class ILoRA(SecondAdapter):
    """Old examples come in the batches of `replay`; the slow adapter runs over the same batch, without gradients."""

    weight: float = 1.0
    keep: float = 0.75
    consistency: Consistency = Consistency.masked
    layers: Layers = Layers.all
    answer: Answer = Answer.slow

    uses_replay: ClassVar[bool] = True
    reads_activations: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    uses_validation: ClassVar[bool] = False  # the best epoch of the trained adapter is not that of the slow one
    saved: ClassVar[tuple[str, ...]] = ("learned",)
    saved_in_task: ClassVar[tuple[str, ...]] = ("second", "steps")

    def __post_init__(self) -> None:
        require(self.weight >= 0, "method.weight", self.weight, "0 or more")
        require(0 <= self.keep <= 1, "method.keep", self.keep, "in [0, 1]")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory: set replay=reservoir, dynamic, share or all")
        if peft.traits.full:
            raise ConfigError(f"method={self.name} needs an adapter and cannot run with peft={peft.name}")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.learned = self.steps = 0  # tasks learned, and steps of the present one
        self.old_count = 1  # old examples in the whole batch
        modules = self.objective.adapters.model.named_modules()
        blocks = {name: module for name, module in modules if isinstance(module, GradientCheckpointingLayer)}
        if not blocks:
            raise ModelError(f"method={self.name} finds no blocks in this model")
        chosen = list(blocks.items())[-LAST if self.layers is Layers.last3 else 0 :]
        self.outputs: dict[str, Tensor] | None = None  # of the blocks in a forward pass that records them
        for name, module in chosen:
            module.register_forward_hook(self.recording(name))

    def recording(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        """A forward hook that records a block's output."""

        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            if self.outputs is not None:
                self.outputs[name] = output if isinstance(output, Tensor) else output[0]

        return record

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Gives the outputs of the blocks in the forward pass inside."""
        outputs: dict[str, Tensor] = {}
        self.outputs = outputs
        try:
            yield outputs
        finally:
            self.outputs = None

    @property
    def answers_with_second(self) -> bool:
        return self.answer is Answer.slow and self.learned > 0

    def hooks(self, index: int) -> StepHooks:
        return replace(super().hooks(index), validate=None)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.learned, self.steps = index, 0
        super().learn(task, index, trainer)

    def before_step(self, context: StepContext) -> None:
        self.old_count = int((self.data.train.tasks[context.rows] != context.task).sum())

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        old = batch.tasks != context.task
        # The ranks of a sharded backbone run the slow adapter together, also those that have no old example.
        compared = self.old_count > 0 if get_world().sharded else bool(old.any())
        if not (self.learned and self.weight and compared):
            return super().loss(context)
        with self.recorded() as fast:
            loss = super().loss(context)
        with torch.no_grad(), self.second.active(), self.recorded() as slow:
            self.objective.loss(batch)
        total = torch.zeros((), device=self.objective.device)
        for name, values in fast.items():
            mask = mask_of(self.objective.masks(batch), values, name)
            counted = old[:, None].expand(values.shape[:2]) if mask is None else mask * old[:, None]
            total = total + difference(values, slow[name], counted, self.consistency is Consistency.masked)
        # The trainer weights a micro-batch by its share of the batch; dividing makes this a mean over old examples.
        return loss + self.weight * total / (len(fast) * self.old_count * batch.share)

    def after_step(self, context: StepContext) -> None:
        self.steps += 1
        if self.learned:
            self.second.average(share_kept(self.steps, self.keep))

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        if index == 0:
            self.second.follow()
        self.learned = index + 1


def share_kept(step: int, limit: float) -> float:
    """a = min(1 - 1 / (k + 1), limit) after step k."""
    return min(1 - 1 / (step + 1), limit)


def difference(fast: Tensor, slow: Tensor, mask: Tensor, masked: bool) -> Tensor:
    """Sum over examples of the mean square of h_S - h_F over the tokens in `mask` [batch, length] and all units.

    With `masked` only positive differences count.
    """
    gap = slow.float() - fast.float()
    squares = (gap.relu() if masked else gap).square().mean(-1) * mask
    return (squares.sum(1) / mask.sum(1).clamp(min=1)).sum()
