"""Recurrent-KIF: importance and fusion over and over inside a task, against a memory (arXiv 2502.17510).

From task 2 on, Q steps on the new data (inner) and M on the memory (outer) take turns. With the weights 0 at the last
fusion, Q after the inner and Q + M after the outer steps, t_in = W_Q - W_0 and t_out = W_{Q+M} - W_Q, and m_in, m_out
the masks of the weights whose importance in these steps lies above the quantile over all of them:
    paper  W = W_0 + m_in t_in + m_out t_out
    code   W = W_0 + w_in t_in + w_out t_out with (w_in, w_out) = (.4, .6) where both masks are 1, (.5, .5) where
           none is, (1, 0) and (0, 1) where one is: nothing is pruned, the default
Training goes on from W. One optimiser serves both loops, and the learning-rate schedule advances on inner steps only;
inner steps left over at the end of a task stay as they are.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.importance import Importance, above_quantile, flat, gradients, unflat
from clpet.replay.batch_plan import BatchPlan
from clpet.training.trainer import Trainer


@dataclass
class RecurrentKIF(Method):
    """The adapter's weights are fused one by one; heads train through."""

    inner_steps: int = 8
    outer_steps: int = 4
    fuse: str = "code"
    outer_weight: float = 1.0
    quantile: float = 0.8
    beta1: float = 0.85
    beta2: float = 0.85
    clear_outer: bool = False

    uses_replay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.inner_steps >= 1, "method.inner_steps", self.inner_steps, "at least 1")
        require(self.outer_steps >= 1, "method.outer_steps", self.outer_steps, "at least 1")
        require(self.fuse in ("code", "paper"), "method.fuse", self.fuse, "code or paper")
        require(0 <= self.quantile <= 1, "method.quantile", self.quantile, "in [0, 1]")
        require(self.outer_weight > 0, "method.outer_weight", self.outer_weight, "more than 0")
        for knob in ("beta1", "beta2"):
            require(0 <= getattr(self, knob) < 1, f"method.{knob}", getattr(self, knob), "in [0, 1)")

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory: replay=share, fixed, dynamic, reservoir or all")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.statistics: dict[str, float] = {}

    def plan(self, index: int) -> BatchPlan:
        new = self.replay.new_only_plan(index)
        if not self.replay.memory:
            return new
        return alternate(new, self.replay.memory_only_plan(index), self.inner_steps, self.outer_steps)

    def fit(self, trainer: Trainer, index: int) -> None:
        self.live: dict[str, Tensor] = dict(self.objective.adapters.tensors("default"))
        self.inner, self.outer = self.scores(), self.scores()
        self.start = self.middle = flat(self.live.values())
        self.steps = self.fusions = 0
        self.taken, self.left_out = False, [0, 0]  # whether this step was taken; inner and outer steps that were not
        super().fit(trainer, index)
        skipped = sum(self.left_out) + int(self.inner.skipped + self.outer.skipped)
        statistics = {"fusions": self.fusions, "skipped_steps": skipped, "skipped_outer_steps": self.left_out[1]}
        self.statistics = {name: float(value) for name, value in statistics.items()}

    def scores(self) -> Importance:
        """First-order importance of every weight, from 0."""
        size = sum(value.numel() for value in self.live.values())
        place = torch.zeros((), device=self.objective.device)
        return Importance(size, "first", self.beta1, self.beta2, False, place)

    @property
    def place(self) -> int:
        """Of the current step in its round; outer steps follow the inner ones. Without a memory all are inner."""
        return self.steps % (self.inner_steps + self.outer_steps) if self.replay.memory else 0

    def adjust_gradients(self) -> None:
        """Weighs the gradient of a memory batch, before it is clipped."""
        if self.place >= self.inner_steps and self.outer_weight != 1:
            found = [value.grad for value in self.parameters() if value.grad is not None]
            torch._foreach_mul_(found, self.outer_weight)

    def after_step(self) -> None:
        self.taken = True
        if self.replay.memory:
            part = self.inner if self.place < self.inner_steps else self.outer
            part.update(list(self.live.values()), gradients(self.live))

    def after_batch(self) -> None:
        """Ends the inner steps of a round, or the round, whether or not the step at its border was taken."""
        place = self.place
        self.left_out[place >= self.inner_steps] += not self.taken
        self.taken, self.steps = False, self.steps + 1
        if self.replay.memory and place == self.inner_steps - 1:
            self.middle = flat(self.live.values())
        elif place == self.inner_steps + self.outer_steps - 1:
            self.fuse_steps()

    @torch.no_grad()
    def fuse_steps(self) -> None:
        """The end of a round."""
        inner, outer = self.middle - self.start, flat(self.live.values()) - self.middle
        masks = [above_quantile(found.elements(), self.quantile) for found in (self.inner, self.outer)]
        self.start = self.start + fused_step(inner, outer, masks[0], masks[1], self.fuse)
        for value, fused in zip(self.live.values(), unflat(self.start, self.live).values(), strict=True):
            value.copy_(fused)
        self.inner.clear()
        if self.clear_outer:
            self.outer.clear()
        self.fusions += 1

    def task_state(self) -> dict[str, Any]:
        scores = {"inner": self.inner.state(), "outer": self.outer.state()}
        counts = {"steps": self.steps, "fusions": self.fusions, "left_out": self.left_out}
        return {**scores, **counts, "start": self.start, "middle": self.middle}

    def load_task_state(self, state: dict[str, Any]) -> None:
        self.inner.load(state["inner"])
        self.outer.load(state["outer"])
        self.start, self.middle = (state[name].to(self.start.device, copy=True) for name in ("start", "middle"))
        self.steps, self.fusions, self.left_out = state["steps"], state["fusions"], list(state["left_out"])

    def diagnostics(self) -> dict[str, float]:
        return self.statistics


def fused_step(inner: Tensor, outer: Tensor, in_mask: Tensor, out_mask: Tensor, how: str) -> Tensor:
    """How far a round goes in all, from what its inner and outer steps went and where they mattered."""
    if how == "paper":
        return in_mask * inner + out_mask * outer
    same = torch.where(in_mask, 0.4, 0.5)
    weight = torch.where(in_mask == out_mask, same, in_mask.to(same.dtype))
    return weight * inner + (1 - weight) * outer


def alternate(new: BatchPlan, old: BatchPlan, inner: int, outer: int) -> BatchPlan:
    """`inner` batches of the new data, `outer` of the memory, and so on; both are passed over again and again.

    An epoch has as many steps as one pass over the new data takes with its share of memory steps, rounded up;
    rounds do not end with it. The learning-rate schedule counts steps on new data.
    """
    steps = new.steps + -(-new.steps * outer // inner)
    passes = [lru_cache(maxsize=2)(plan.epoch) for plan in (new, old)]

    def batch(step: int) -> np.ndarray:
        turn, place = divmod(step, inner + outer)
        fresh = place < inner
        number = turn * inner + place if fresh else turn * outer + place - inner
        count, row = divmod(number, new.steps if fresh else old.steps)
        return passes[0 if fresh else 1](count)[row]

    def clock(step: int) -> int:
        turn, place = divmod(step, inner + outer)
        return turn * inner + min(place, inner)

    def epoch(number: int) -> list[np.ndarray]:
        return [batch(step) for step in range(number * steps, (number + 1) * steps)]

    return BatchPlan(new.pool, steps, epoch, clock=clock)
