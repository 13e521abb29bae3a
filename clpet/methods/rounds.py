"""Rounds of steps on new data (inner) and on a memory (outer), with a fusion of weights at the end of each."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.importance import flat, unflat
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.records import State
from clpet.runtime.sharding.tensors import local, pack, unpack
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class Rounds(Method):
    """From task 2 on, the adapter's weights are W_0 at the start of a round, W_Q after its inner and W_{Q+M} after its
    outer steps; then they become W_0 + `fused`(W_Q - W_0, W_{Q+M} - W_Q), from where the next round starts.

    A subclass says to which loop a step belongs, when a loop is over, and how the two changes are fused. Heads are
    trained by all steps and not fused; nor are the steps of an incomplete round at the end of a task.
    """

    uses_replay: ClassVar[bool] = True
    saved_in_task: ClassVar[tuple[str, ...]] = ("steps", "fusions", "skipped=left_out", "start", "middle")

    @property
    def in_outer_loop(self) -> bool:
        """Whether the present step is on the memory."""
        raise NotImplementedError

    def loop_is_over(self, context: StepContext) -> bool:
        """Whether the present step, which is done or was skipped, is the last of its loop. Not called in task 1."""
        raise NotImplementedError

    def fused(self, inner: Tensor, outer: Tensor) -> Tensor:
        """The change of the weights by a whole round, from those by its two loops; flat vectors as of `flat`."""
        raise NotImplementedError

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory: set replay=share, fixed, dynamic, reservoir or all")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.statistics: dict[str, float] = {}

    def start_rounds(self, index: int) -> None:
        """Sets what the rounds of a task gather to its first values."""
        self.live: dict[str, Tensor] = dict(self.objective.adapters.tensors("default"))
        self.start = self.middle = flat(self.live.values())  # W_0 and W_Q
        self.steps = self.fusions = 0
        self.step_done, self.skipped = False, [0, 0]  # whether this step was done; skipped inner and outer steps

    def fit(self, trainer: Trainer, index: int) -> None:
        self.start_rounds(index)
        super().fit(trainer, index)
        statistics = {
            "fusions": self.fusions, "skipped_steps": sum(self.skipped), "skipped_outer_steps": self.skipped[1]
        }  # fmt: skip
        self.statistics = {name: float(value) for name, value in statistics.items()}

    def after_step(self, context: StepContext) -> None:
        self.step_done = True

    def end_step(self, context: StepContext) -> None:
        """Ends the inner steps of a round, or the round, even if its last step was skipped."""
        outer = self.in_outer_loop
        self.skipped[outer] += not self.step_done
        ended = bool(self.replay.memory) and self.loop_is_over(context)
        self.step_done, self.steps = False, self.steps + 1
        if ended and outer:
            self.fuse_steps()
        elif ended:
            self.middle = flat(self.live.values())  # W_Q

    @torch.no_grad()
    def fuse_steps(self) -> None:
        """Ends a round: W = W_0 + the fused steps."""
        inner, outer = self.middle - self.start, flat(self.live.values()) - self.middle
        self.start = self.start + self.fused(inner, outer)
        for value, fused in zip(self.live.values(), unflat(self.start, self.live).values(), strict=True):
            local(value.detach()).copy_(fused)
        self.fusions += 1

    def task_state(self) -> State:
        tensors = list(self.live.values())
        return {**super().task_state(), "start": pack(self.start, tensors), "middle": pack(self.middle, tensors)}

    def load_task_state(self, state: State) -> None:
        vectors = {name: unpack(cast(Tensor, state[name]), list(self.live.values())) for name in ("start", "middle")}
        super().load_task_state({**state, **vectors})

    def diagnostics(self) -> dict[str, float]:
        return self.statistics
