"""DER and DER++: replay of labels and of earlier logits (Buzzega et al., 2020, arXiv 2004.07211).

With z' the logits that the model gave for an old example x' before (equations 5 and 6),
    L = CE(f(x), y) + alpha mean (f(x') - z')^2 + beta CE(f(x'), y'),   DER: beta = 0
The mean is over the columns that z' has. z' are, by `logits_from`,
    stored   those at the moment when x' entered the reservoir, which is filled at every step (published)
    teacher  those of the model from before the task (none in the first one); the memory changes after a task
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.components.memory_gradient import mean_gradient
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.replay import DrawnReplay
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.objectives.classification import Classification
from clpet.replay.sampled import ReservoirReplay
from clpet.runtime.sharding.gradients import local_gradients
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Source(Enum):
    """Where earlier logits come from; auto: stored for labels, teacher for words, whose logits are too many."""

    auto = "auto"
    stored = "stored"
    teacher = "teacher"


class OfferEpochs(Enum):
    """Epochs of a task in which its examples are offered to the reservoir."""

    all = "all"
    first = "first"


@dataclass
class DERPP(DrawnReplay):
    """Draws old examples itself at every step, so a batch of the plan has new ones alone.

    The terms of old examples are added as gradients, in micro-batches of their own; the recorded loss is that of the
    new examples. draws=1: both terms are of the same examples, in one forward pass; 2: each has its own (published).
    """

    alpha: float = 0.1
    beta: float = 1.0
    draws: int = 1
    memory_batch: int | None = None
    logits_from: Source = Source.auto
    offer_epochs: OfferEpochs = OfferEpochs.all

    needs_logits: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("stored_logits",)
    saved_in_task: ClassVar[tuple[str, ...]] = ("replay", "stored_logits")

    def __post_init__(self) -> None:
        require(self.alpha >= 0, "method.alpha", self.alpha, "0 or more")
        require(self.beta >= 0, "method.beta", self.beta, "0 or more")
        require(self.draws in (1, 2), "method.draws", self.draws, "1 or 2")
        require(self.memory_batch is None or self.memory_batch >= 1, "method.memory_batch", self.memory_batch,
                "at least 1, or null")  # fmt: skip

    def stores(self, objective: Objective) -> bool:
        """Whether logits are stored, and not computed by a teacher."""
        if self.logits_from is Source.auto:
            return objective.traits.has_labels
        return self.logits_from is Source.stored

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if not self.stores(objective):
            return
        if not objective.traits.has_labels:
            raise ConfigError(
                "method.logits_from=stored would store a vocabulary's logits per token: set it to teacher"
            )
        if replay != "reservoir":
            raise ConfigError(
                f"method={self.name} fills its memory at every step: set replay=reservoir, not {replay}, or "
                "method.logits_from=teacher"
            )

    def ineffective(self) -> dict[str, str]:
        unused = super().ineffective()
        if not self.stores(self.objective):
            unused["method.offer_epochs"] = "a teacher computes the logits, and the memory changes after a task"
        if not self.beta:
            unused["method.draws"] = "with method.beta=0 there is one term of old examples"
        return unused

    def init_adapters(self) -> None:
        super().init_adapters()
        self.stored_logits = torch.zeros(0, 0, device=self.objective.device)  # [stored, columns], infinite: none
        self.teacher: SecondWeights | None = None
        self.drawn: list[tuple[np.ndarray, Tensor]] = []  # of this step: train rows and their stored logits

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        teaches = index > 0 and not self.stores(self.objective)
        self.teacher = SecondWeights(self, self.named_parameters()) if teaches else None
        super().learn(task, index, trainer)
        self.teacher = None

    def before_step(self, context: StepContext) -> None:
        """Draws old examples, and then offers the new ones to the reservoir with the logits before this step."""
        rng = np.random.default_rng(derive(self.seed, "derpp", context.task, context.epoch, context.step))
        rows = self.replay.memory_rows() if self.replay.memory else np.empty(0, dtype=np.int64)
        size = min(len(rows), self.memory_batch or self.replay.batch_size)
        draws = [rng.choice(len(rows), size, replace=False) for _ in range(self.draws if self.beta else 1)]
        stores = self.stores(self.objective)
        # An index makes a copy, so what is offered below does not change what was drawn.
        values = [self.stored_logits[torch.from_numpy(draw)] if stores else self.stored_logits for draw in draws]
        self.drawn = [(rows[draw], value) for draw, value in zip(draws, values, strict=True)] if size else []
        if stores and (self.offer_epochs is OfferEpochs.all or context.epoch == 0):
            self.offer(context.rows, rng)

    def offer(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """Offers rows to the reservoir, and stores the logits, without dropout, of those that enter."""
        assert isinstance(self.replay, ReservoirReplay)
        slots = self.replay.offer(rows, rng)
        if not (slots >= 0).any():
            return
        with self.objective.adapters.evaluating():
            logits = self.embed(rows[slots >= 0], self.logits)
        more = len(self.replay.memory[0]) - len(self.stored_logits), logits.shape[1] - self.stored_logits.shape[1]
        self.stored_logits = F.pad(self.stored_logits, (0, max(0, more[1]), 0, more[0]), value=float("inf"))
        for slot, values in zip(slots[slots >= 0].tolist(), logits, strict=True):  # a slot may be entered twice
            self.stored_logits[slot] = values

    def adjust_gradients(self, context: StepContext) -> None:
        """Adds the gradients of the terms of old examples."""
        if not self.drawn or (self.teacher is None and not self.stores(self.objective)):
            return
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        gradient = local_gradients(parameters)
        weights = [(self.alpha, self.beta)] if len(self.drawn) == 1 else [(self.alpha, 0.0), (0.0, self.beta)]
        for (rows, stored), (alpha, beta) in zip(self.drawn, weights, strict=True):
            terms = self.memory_terms(rows, stored, alpha, beta)
            torch._foreach_add_(gradient, mean_gradient(self, rows, parameters, terms))

    def memory_terms(
        self, rows: np.ndarray, stored: Tensor, alpha: float, beta: float
    ) -> Callable[[np.ndarray], Tensor]:
        """The terms of drawn train rows with these weights, as a function of positions in `rows`."""

        def terms(positions: np.ndarray) -> Tensor:
            batch = self.data.train.batch(rows[positions], self.objective.device)
            logits = self.logits(batch)
            loss = beta * self.cross_entropy(logits, batch)
            if not alpha:
                return loss
            earlier = stored[torch.from_numpy(positions)] if self.teacher is None else self.teacher.logits(batch)
            return loss + alpha * distance(logits, earlier)

        return terms

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """The objective's loss, from logits that are there already."""
        if isinstance(self.objective, Classification):
            return self.objective.cross_entropy(logits, batch)
        return F.cross_entropy(logits, self.objective.targets(batch))

    def after_task(self, task: Task, index: int) -> None:
        if not self.stores(self.objective):
            super().after_task(task, index)


def distance(logits: Tensor, earlier: Tensor) -> Tensor:
    """mean_i mean_c (z_ic - z'_ic)^2 over the columns c that z'_i has: the first ones, and none that is infinite."""
    present = earlier.isfinite()
    squares = (logits[:, : earlier.shape[1]] - torch.where(present, earlier, 0)).square() * present
    return (squares.sum(1) / present.sum(1).clamp(min=1)).mean()
