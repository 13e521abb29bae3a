"""EWC: a quadratic penalty on changes of the weights that matter to earlier tasks (Kirkpatrick et al., 2017).

Fisher information F_j of task j, from the gradients of its train examples (method.fisher):
    labels   (1/#batches) sum_batches sum_c w_c (gradient of the batch-mean NLL of label c)^2, w = batch-mean softmax;
             the baseline of ConPET (section 3.6)
    batch    mean over batches of the squared gradient of the batch's cross-entropy with the true labels
    sample   the same for every single example
Penalty while task k is learned, over adapter and head rows (method.merge):
    tasks                lambda sum_{j<k} 1/2 sum F_j (theta - theta_j)^2
    average, sum, decay  lambda / 2 sum F (theta - theta_{k-1})^2, with one F merged from those of all earlier tasks
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.replay import Static
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.runtime.distributed import is_sharded
from clpet.runtime.sharding.gradients import gradients
from clpet.runtime.sharding.tensors import aligned, local, sums, wrap
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Fisher(Enum):
    """The gradients that are squared: those of all labels, weighted by probability, of a batch, or of one example."""

    labels = "labels"
    batch = "batch"
    sample = "sample"


class Merge(Enum):
    """How the F of the tasks are combined: each around its task's weights, or one F around the newest weights."""

    tasks = "tasks"
    average = "average"
    sum = "sum"
    decay = "decay"


@dataclass
class EWC(Static):
    """Stores the sum over tasks as one quadratic: S = sum F_j, M = sum F_j theta_j, Q = sum F_j theta_j^2.

    By completing the square, sum_j F_j (theta - theta_j)^2 = S (theta - M/S)^2 + (Q - M^2/S), so that memory and time
    do not grow with the number of tasks.
    """

    strength: float = 10_000.0
    fisher_batches: int | None = None
    fisher: Fisher = Fisher.batch
    merge: Merge = Merge.tasks
    decay: float = 0.9

    saved: ClassVar[tuple[str, ...]] = ("quadratic",)

    def __post_init__(self) -> None:
        require(self.strength >= 0, "method.strength", self.strength, "0 or more")
        count = self.fisher_batches
        require(count is None or count >= 1, "method.fisher_batches", count, "at least 1, or null for all")
        require(0 <= self.decay <= 1, "method.decay", self.decay, "in [0, 1]")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if self.fisher is Fisher.labels and not objective.traits.has_labels:
            raise ConfigError(
                f"method.fisher=labels needs labels, which objective={objective.name} lacks: use batch or sample"
                " (usually method.fisher=batch method.merge=average method.strength=5000)"
            )

    def ineffective(self) -> dict[str, str]:
        return {} if self.merge is Merge.decay else {"method.decay": "it is for method.merge=decay"}

    def init_adapters(self) -> None:
        super().init_adapters()
        self.quadratic: dict[str, Triple] = {}  # name -> S, M, Q in fp64

    def step_loss(self, context: StepContext) -> Tensor | None:
        return self.penalty() if self.quadratic and self.strength else None

    def penalty(self) -> Tensor:
        """lambda sum_j 1/2 sum F_j (theta - theta_j)^2; head rows added after task j are not part of F_j."""
        total = torch.zeros((), device=self.objective.device)
        of_rows: list[tuple[Tensor, Tensor]] = []
        for name, (s, centre, constant) in self.centres.items():
            theta = local(self.trained[name])[: len(s)]
            term = (s * (theta - centre).square()).sum()
            if is_sharded(self.trained[name]):
                of_rows.append((self.trained[name], term + constant))
            else:
                total = total + term + constant
        return 0.5 * self.strength * sum(sums(of_rows), total)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.prepare(index)
        super().learn(task, index, trainer)

    def prepare(self, index: int) -> None:
        """Completes the square once per task: centre M/S and constant sum(Q - M^2/S) of every tensor."""
        self.grow_head(index)
        self.trained = self.named_parameters()
        self.centres = {}
        for name, triple in self.quadratic.items():
            s, m, q = (local(aligned(value, self.trained[name])) for value in triple)
            centre = torch.where(s > 0, m / s.clamp(min=1e-300), m)  # where S = 0, M = 0 and the centre is irrelevant
            constant = (q - s * centre.square()).sum().clamp(min=0)  # rounding could make it negative
            self.centres[name] = (s.float(), centre.float(), constant.float())

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        for name, value in self.information(index).items():
            trained = self.named_parameters()[name]
            theta = local(trained.detach()).double()
            saved = self.quadratic.get(name)
            old = None if saved is None else [local(aligned(tensor, trained)) for tensor in saved]
            if old is not None and self.merge is not Merge.tasks:
                value = merged(_grown(old[0], value), value, index, self.merge, self.decay)
            added: Triple = (value, value * theta, value * theta.square())
            added = added if old is None or self.merge is not Merge.tasks else _sum(old, added)
            self.quadratic[name] = [wrap(tensor, trained) for tensor in added]

    def information(self, index: int) -> dict[str, Tensor]:
        """F_k of the task just learned, in fp64, of this rank's rows; dropout is off outside of fits."""
        named = self.named_parameters()
        pool, size = self.data.train, self.replay.batch_size
        batches = pool.shuffled(pool.rows_of(index), size, self.replay.rng(index, "fisher"))[: self.fisher_batches]
        total = {name: torch.zeros_like(local(value.detach()), dtype=torch.float64) for name, value in named.items()}
        examples = sum(len(rows) for rows in batches)
        for rows in batches:
            share = 1 / len(batches) if self.fisher is Fisher.labels else len(rows) / examples
            for weight, loss in self.losses(rows):
                for name, grad in zip(named, gradients(loss, named), strict=True):
                    if grad is not None:  # None: the loss does not depend on it, such as an unused pooler
                        total[name] += share * weight * grad.double().square()
        return total

    def losses(self, rows: np.ndarray) -> Iterator[tuple[Tensor | float, Tensor]]:
        """Yields (weight, loss whose gradient is squared) for one batch; the weights sum to one."""
        pool, device = self.data.train, self.objective.device
        if self.fisher is Fisher.labels:
            batch, objective = pool.batch(rows, device), self.objective
            nll = -self.logits(batch).log_softmax(1)
            weights = (-nll).exp().mean(0).detach().double()
            flops = objective.flops.network.backward(objective.work(batch))
            objective.meter.count_backward(batch, flops, len(weights) - 1)  # the first one is counted with its pass
            yield from ((weight, nll[:, column].mean()) for column, weight in enumerate(weights))
            return
        for chunk in [rows] if self.fisher is Fisher.batch else np.split(rows, len(rows)):
            yield len(chunk) / len(rows), self.loss(StepContext.of(pool.batch(chunk, device)))


Triple = Sequence[Tensor]


def merged(old: Tensor, new: Tensor, count: int, how: Merge, decay: float) -> Tensor:
    """Merges F of `count` earlier tasks with that of the new one: their average, sum, or decayed sum."""
    if how is Merge.average:
        return (new + count * old) / (count + 1)
    return new + (old if how is Merge.sum else decay * old)


def _sum(old: Triple, new: Triple) -> Triple:
    return [_grown(a, b) + b for a, b in zip(old, new, strict=True)]


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """`old`, padded with zeros to the number of rows of `new`: a head has grown in between."""
    if len(old) == len(new):
        return old
    return torch.cat([old, old.new_zeros(len(new) - len(old), *old.shape[1:])])
