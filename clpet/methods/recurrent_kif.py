"""Recurrent-KIF: repeated importance and fusion within a task, with a memory (Feng et al., 2025, arXiv 2502.17510).

From task 2 on, a round is Q steps on new data (inner) and then M steps on the memory (outer). Let W_0 be the weights at
the start of the round, W_Q those after the inner and W_{Q+M} those after the outer steps; t_in = W_Q - W_0 and
t_out = W_{Q+M} - W_Q. m_in and m_out are the masks of weights whose importance in these steps is above the quantile
over all weights. At the end of the round
    paper  W = W_0 + m_in t_in + m_out t_out
    code   W = W_0 + w_in t_in + w_out t_out, with (w_in, w_out) = (.4, .6) if both masks are 1, (.5, .5) if none is,
           (1, 0) or (0, 1) if only one is; unlike `paper` nothing is pruned (default)
and training continues from W. Both loops use one optimiser; the learning-rate schedule counts inner steps only. Inner
steps of an incomplete round at the end of a task are not fused.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.methods.components.importance import Importance, above_quantile, flat, gradients
from clpet.methods.rounds import Rounds
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.sharding.gradients import local_gradients
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class RecurrentKIF(Rounds):
    """Fuses the adapter's weights individually; heads are trained by all steps and not fused."""

    inner_steps: int = 8
    outer_steps: int = 4
    fuse: str = "code"
    outer_weight: float = 1.0
    quantile: float = 0.8
    beta1: float = 0.85
    beta2: float = 0.85
    clear_outer: bool = False

    saved_in_task: ClassVar[tuple[str, ...]] = ("inner", "outer")

    def __post_init__(self) -> None:
        require(self.inner_steps >= 1, "method.inner_steps", self.inner_steps, "at least 1")
        require(self.outer_steps >= 1, "method.outer_steps", self.outer_steps, "at least 1")
        require(self.fuse in ("code", "paper"), "method.fuse", self.fuse, "code or paper")
        require(0 <= self.quantile <= 1, "method.quantile", self.quantile, "in [0, 1]")
        require(self.outer_weight > 0, "method.outer_weight", self.outer_weight, "more than 0")
        for option in ("beta1", "beta2"):
            require(0 <= getattr(self, option) < 1, f"method.{option}", getattr(self, option), "in [0, 1)")

    def plan(self, index: int) -> BatchPlan:
        new = self.replay.new_only_plan(index)
        if not self.replay.memory:
            return new
        return alternate(new, self.replay.memory_only_plan(index), self.inner_steps, self.outer_steps)

    def start_rounds(self, index: int) -> None:
        super().start_rounds(index)
        self.inner, self.outer = self.scores(), self.scores()

    def fit(self, trainer: Trainer, index: int) -> None:
        super().fit(trainer, index)
        self.statistics["skipped_steps"] += int(self.inner.skipped + self.outer.skipped)

    def scores(self) -> Importance:
        """New first-order importance scores of every weight, from 0."""
        size, tensors = len(flat(self.live.values())), list(self.live.values())
        like = torch.zeros((), device=self.objective.device)
        return Importance(size, "first", self.beta1, self.beta2, False, like, tensors)

    @property
    def step_in_round(self) -> int:
        """Number of the current step in its round, 0 to Q - 1 inner, Q to Q + M - 1 outer; 0 without a memory."""
        return self.steps % (self.inner_steps + self.outer_steps) if self.replay.memory else 0

    @property
    def in_outer_loop(self) -> bool:
        return self.step_in_round >= self.inner_steps

    def loop_is_over(self, context: StepContext) -> bool:
        return self.step_in_round in (self.inner_steps - 1, self.inner_steps + self.outer_steps - 1)

    def adjust_gradients(self, context: StepContext) -> None:
        """Multiplies the gradient of a memory batch by outer_weight, before it is clipped."""
        if self.in_outer_loop and self.outer_weight != 1:
            torch._foreach_mul_(local_gradients(self.parameters()), self.outer_weight)

    def after_step(self, context: StepContext) -> None:
        super().after_step(context)
        if self.replay.memory:
            importance = self.outer if self.in_outer_loop else self.inner
            importance.update(list(self.live.values()), gradients(self.live))

    def fused(self, inner: Tensor, outer: Tensor) -> Tensor:
        """The fused steps; importance starts again."""
        masks = [
            above_quantile(scores.elements(), self.quantile, scores.tensors) for scores in (self.inner, self.outer)
        ]
        self.inner.clear()
        if self.clear_outer:
            self.outer.clear()
        return fused_step(inner, outer, masks[0], masks[1], self.fuse)


def fused_step(inner: Tensor, outer: Tensor, in_mask: Tensor, out_mask: Tensor, how: str) -> Tensor:
    """W - W_0 of a round from t_in, t_out and the masks of important weights, for method.fuse = `how`."""
    if how == "paper":
        return in_mask * inner + out_mask * outer
    equal = torch.where(in_mask, 0.4, 0.5)  # both masks are 1 or both are 0
    weight = torch.where(in_mask == out_mask, equal, in_mask.to(equal.dtype))  # w_in; w_out = 1 - w_in in every case
    return weight * inner + (1 - weight) * outer


def alternate(new: BatchPlan, old: BatchPlan, inner: int, outer: int) -> BatchPlan:
    """Alternates `inner` batches of `new` with `outer` batches of `old`; both plans are repeated as often as needed.

    An epoch has the steps of one pass over the new data plus the memory steps between them, rounded up; a round may
    continue in the next epoch. `clock` gives the step of the learning-rate schedule, which counts new data only.
    """
    steps = new.steps + -(-new.steps * outer // inner)
    epochs = [lru_cache(maxsize=2)(plan.epoch) for plan in (new, old)]

    def batch(step: int) -> np.ndarray:
        round_, position = divmod(step, inner + outer)
        is_new = position < inner
        number = round_ * inner + position if is_new else round_ * outer + position - inner  # of this kind so far
        epoch, row = divmod(number, new.steps if is_new else old.steps)
        return epochs[0 if is_new else 1](epoch)[row]

    def clock(step: int) -> int:
        round_, position = divmod(step, inner + outer)
        return round_ * inner + min(position, inner)

    def epoch(number: int) -> list[np.ndarray]:
        return [batch(step) for step in range(number * steps, (number + 1) * steps)]

    return BatchPlan(new.pool, steps, epoch, clock=clock)
