"""Merging: every task trains a LoRA, and the model that answers has the merged changes of all tasks.

With tau_t = s B_t A_t, the change of a layer's weight by task t (task vector), the answers are those of
    W_0 + scale merge(tau_1, ..., tau_t)
Training never starts from the merged weights, but by `start` from
    base   the pretrained ones (a new LoRA per task)
    last   those after the task before (one LoRA goes through all tasks, and tau_t is the change by all of them)
The rules are in components/task_vectors.py: arithmetic (arXiv 2212.04089), ties (2306.01708), dare (2311.03099, then
arithmetic or ties), magmax (2407.06322) and opcm (2501.09522). The head is trained by every task and not merged.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components import task_vectors
from clpet.methods.components.task_vectors import DenseIncrements, Vector
from clpet.methods.inc_lora import IncLoRA
from clpet.models.stacked_lora import add_to_weight
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.records import State


class Rule(Enum):
    """How task vectors are merged."""

    arithmetic = "arithmetic"
    ties = "ties"
    dare = "dare"
    magmax = "magmax"
    opcm = "opcm"


class Start(Enum):
    """The weights from which a task is trained; auto: last for magmax, base for the others."""

    auto = "auto"
    base = "base"
    last = "last"


class Then(Enum):
    """The rule by which dare merges what it has not dropped."""

    arithmetic = "arithmetic"
    ties = "ties"


class Aggregate(Enum):
    """How ties aggregates the values with the elected sign."""

    mean = "mean"
    sum = "sum"


class Trim(Enum):
    """Entries that ties keeps: exactly the share `keep`, or one more and its equals, as the published code does."""

    exact = "exact"
    faithful = "faithful"


@dataclass
class Merge(IncLoRA):
    """All rules work on the products B A, never on the factors. The merged change is dense: d_out d_in per layer.

    Stored are the factors of all tasks; opcm instead stores its merged change, and the factors of the newest task only.
    """

    rule: Rule = Rule.arithmetic
    start: Start = Start.auto
    scale: float | None = None
    keep: float = 0.2
    aggregate: Aggregate = Aggregate.mean
    trim: Trim = Trim.exact
    drop: float = 0.5
    then: Then = Then.arithmetic
    alpha: float = 0.5

    saved: ClassVar[tuple[str, ...]] = ("total", "total_scale", "norms")

    def __post_init__(self) -> None:
        require(self.scale is None or self.scale > 0, "method.scale", self.scale, "more than 0, or null")
        require(0 < self.keep <= 1, "method.keep", self.keep, "in (0, 1]")
        require(0 <= self.drop < 1, "method.drop", self.drop, "in [0, 1)")
        require(0 < self.alpha < 1, "method.alpha", self.alpha, "between 0 and 1")

    def ineffective(self) -> dict[str, str]:
        ties = self.rule is Rule.ties or (self.rule is Rule.dare and self.then is Then.ties)
        used = {"keep": ties, "aggregate": ties, "trim": ties, "drop": self.rule is Rule.dare,
                "then": self.rule is Rule.dare, "alpha": self.rule is Rule.opcm}  # fmt: skip
        return {f"method.{name}": f"it is not for method.rule={self.rule.value}" for name, on in used.items() if not on}

    @property
    def factor(self) -> float:
        """`scale`, or the published one of the rule."""
        published = {
            Rule.arithmetic: 0.3,
            Rule.ties: 0.55 if self.aggregate is Aggregate.mean else 0.3,
            Rule.dare: 0.3 if self.then is Then.arithmetic else 0.5,
            Rule.magmax: 0.5,
            Rule.opcm: 1.0,
        }
        return self.scale or published[self.rule]

    @property
    def continues(self) -> bool:
        """Whether a task starts from the weights after the task before."""
        return self.start is Start.last or (self.start is Start.auto and self.rule is Rule.magmax)

    def init_adapters(self) -> None:
        super().init_adapters()
        self.merged_increments = DenseIncrements({name: layer.module for name, layer in self.stack.layers.items()})
        self.objective.adapters.branches.append(self.merged_increments)
        self.total: dict[str, Tensor] = {}  # opcm: T
        self.total_scale = 1.0  # opcm: l
        self.norms: list[float] = []  # opcm: |tau| of every task
        self.index = 0

    def add_branch(self, index: int) -> None:
        """Adds the LoRA of a task; with `start`=last it begins as a copy of the one before."""
        before = {name: (layer.A.detach(), layer.B.detach()) for name, layer in self.stack.layers.items()}
        if self.rule is Rule.opcm:
            for layer in self.stack.layers.values():
                layer.set(layer.A[:0], layer.B[:, :0], layer.A[:0], layer.B[:, :0])
        super().add_branch(index)
        self.index = index
        for name, layer in self.stack.layers.items() if self.continues and index else ():
            with torch.no_grad():
                layer.A.copy_(before[name][0])
                layer.B.copy_(before[name][1])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The newest LoRA goes by the number of its task, since opcm has no others."""
        newest = {name.partition(".")[2]: value for name, value in self.stack.current().items()}
        named = {f"{self.index + 1}.{name}": value for name, value in newest.items()}
        return {**named, **self.objective.parameters()}

    def routed_loss(self, batch: Batch, weights: Tensor | None) -> Tensor:
        """The loss with the newest LoRA alone."""
        with self.stack.selected_branches(weights):
            return self.objective.loss(batch)

    def vectors_of_tasks(self) -> list[Vector]:
        """tau_t [d_out, d_in] by layer, for every task whose factors are stored."""
        rank, all_factors = self.stack.rank, {name: layer.all() for name, layer in self.stack.layers.items()}
        return [
            {
                name: self.stack.scale * (B[:, task * rank : (task + 1) * rank] @ A[task * rank : (task + 1) * rank])
                for name, (A, B) in all_factors.items()
            }
            for task in range(self.stack.branches)
        ]

    def combine(self, vectors: Sequence[Vector]) -> dict[str, Tensor]:
        """The merged vectors of all tasks, before `scale`, by a rule other than opcm."""
        if self.rule is Rule.magmax:
            return task_vectors.magmax(vectors)
        if self.rule is Rule.dare:
            vectors = [self.dropped(vector, task) for task, vector in enumerate(vectors)]
        if self.rule is Rule.ties or (self.rule is Rule.dare and self.then is Then.ties):
            mean, faithful = self.aggregate is Aggregate.mean, self.trim is Trim.faithful
            return task_vectors.ties(vectors, self.keep, mean, faithful)
        return task_vectors.add(vectors)

    def dropped(self, vector: Vector, task: int) -> dict[str, Tensor]:
        """A task's vector by DARE; its mask depends on the task alone, so it is the same in every later merge."""
        return task_vectors.drop(
            vector, self.drop, lambda name: torch.Generator().manual_seed(derive(self.seed, "dare", task, name))
        )

    @torch.no_grad()
    def task_sum(self) -> tuple[dict[str, Tensor], float, list[float]]:
        """The merged vectors with the present LoRA, l and the norms; the last two are those of opcm."""
        vectors = self.vectors_of_tasks()
        if self.rule is not Rule.opcm:
            return self.combine(vectors), 1.0, []
        norms = [*self.norms, float(task_vectors.norm(vectors[-1]))]
        if not self.norms:
            return dict(vectors[-1]), 1.0, norms
        return (*task_vectors.opcm(self.total, self.total_scale, norms, vectors[-1], self.alpha), norms)

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        merged, self.total_scale, self.norms = self.task_sum()
        if self.rule is Rule.opcm:
            self.total = {name: value.contiguous() for name, value in merged.items()}
        self.answer_with(merged)

    def answer_with(self, merged: Vector) -> None:
        """Sets the changes of the weights that answers are computed with."""
        self.merged_increments.tensors = {name: self.factor * value for name, value in merged.items()}

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        self.merged_increments.enabled = True
        try:
            with self.stack.off():
                yield
        finally:
            self.merged_increments.enabled = False

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        with self.answering():
            return self.objective.predict(batch, choices)

    def validate(self, index: int) -> float:
        """The score with the present LoRA merged."""
        self.answer_with(self.task_sum()[0])
        return super().validate(index)

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.rule is Rule.opcm:
            self.answer_with(self.total)
        elif self.stack.branches:
            with torch.no_grad():
                self.answer_with(self.combine(self.vectors_of_tasks()))

    def save(self, folder: Path) -> None:
        """Writes the LoRA of every task whose factors are stored, and the merged changes of the layers' weights."""
        super().save(folder)
        changes = {name: value.cpu().contiguous() for name, value in self.merged_increments.tensors.items()}
        save_file(changes, folder / "merged.safetensors")

    def merged(self) -> nn.Module:
        model = self.objective.adapters.merged()
        for name, value in self.merged_increments.tensors.items():
            add_to_weight(self.stack.layers[name].module, value)
        self.stack.enabled = self.merged_increments.enabled = False
        return model
