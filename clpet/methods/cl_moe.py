"""CL-MoE: MoE-LoRA whose experts are averaged with their earlier values after every task (arXiv 2503.00413).

After task t, the experts P_t are, in every layer (counts=layer) or in all together (all), the `task_experts` that
are most often among the `task_experts` of largest weight for a token of the task's training examples. Then, from the
second task on, with phi_t the values after its training, every expert becomes
    theta_t = g theta_{t-1} + (1 - g) phi_t
with, by `roles`, for the experts that earlier tasks use and this one does not, and for all others,
    comment    g = momentum, and 1 - momentum: what only earlier tasks use is preserved
    published  the other way, as the published code computes it
The routers keep phi_t. With task_id_at_test=true the weights of the experts in answers are
    share w + (1 - share) c_t,   c_t: the shares of the experts in those counts of the example's task
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.subspace import mask_of
from clpet.methods.moe_lora import MoELoRA, expert_weights
from clpet.models.stacked_lora import weights_of_rows
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.training.trainer import Trainer


class Roles(Enum):
    """Which experts keep the larger share of their earlier values: see the module's docstring."""

    comment = "comment"
    published = "published"


class Counts(Enum):
    """Whether a task's experts are chosen for every layer by itself, or for all layers together."""

    layer = "layer"
    all = "all"


@dataclass
class CLMoE(MoELoRA):
    """Training is that of MoE-LoRA. An expert that no task uses is averaged too."""

    task_experts: int = 2
    momentum: float = 0.7
    roles: Roles = Roles.comment
    counts: Counts = Counts.layer
    task_id_at_test: bool = False
    share: float = 0.5

    needs_logits: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("usage",)

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.task_experts
        require(1 <= number <= self.experts, "method.task_experts", number, f"from 1 to {self.experts}")
        require(0 <= self.momentum <= 1, "method.momentum", self.momentum, "in [0, 1]")
        require(0 <= self.share <= 1, "method.share", self.share, "in [0, 1]")

    def ineffective(self) -> dict[str, str]:
        return {} if self.task_id_at_test else {"method.share": "it is for method.task_id_at_test=true"}

    def init_adapters(self) -> None:
        self.usage: list[Tensor] = []  # [layers, experts] of every task: how often an expert was among the largest
        self.batch: Batch | None = None  # whose tokens are counted; None: they are not
        self.counted: dict[int, Tensor] = {}  # [batch, experts] by layer, from the last pass that counts
        self.task_weights: Tensor | None = None  # [batch, layers, experts]: (1 - share) c_t of a batch's tasks
        super().init_adapters()

    def routing(self, number: int, name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
        def weights(x: Tensor) -> Tensor:
            by_input = expert_weights(x, weight, self.top_k)
            if self.batch is not None:
                mask = mask_of(self.objective.masks(self.batch), x, name)
                self.counted[number] = tokens_of_experts(by_input, mask, self.task_experts)
            if self.task_weights is None:
                return by_input
            return with_task(by_input, weights_of_rows(self.task_weights[:, number], x))

        return weights

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.earlier = {name: value.detach().clone() for name, value in self.stack.current().items()}
        super().learn(task, index, trainer)

    def after_task(self, task: Task, index: int) -> None:
        rows = self.data.train.rows_of(index)
        self.usage.append(self.embed(rows, self.count_experts).double().sum(0).view(-1, self.experts))
        if len(self.usage) > 1:
            self.average()
        super().after_task(task, index)

    def count_experts(self, batch: Batch) -> Tensor:
        """[batch, layers * experts]: for how many tokens of a text an expert is among the largest of a layer."""
        self.batch, self.counted = batch, {}
        try:
            self.objective.loss(batch)
        finally:
            self.batch = None
        none = torch.zeros(len(batch), self.experts, device=self.objective.device)  # of a layer that did not run
        return torch.cat([self.counted.get(number, none) for number in range(len(self.stack.layers))], 1)

    def usage_of_tasks(self) -> Tensor:
        """[tasks, layers, experts]: `usage`, the same in all layers with counts=all."""
        usage = torch.stack(self.usage)
        return usage.sum(1, keepdim=True).expand_as(usage) if self.counts is Counts.all else usage

    @torch.no_grad()
    def average(self) -> None:
        """Averages every expert with its values from before the task."""
        usage = self.usage_of_tasks()
        chosen = largest(usage, self.task_experts)  # [tasks, layers, experts]
        shares = earlier_shares(chosen[:-1].any(0), chosen[-1], self.momentum, self.roles)
        for layer, name, share in zip(self.stack.layers.values(), self.stack.layers, shares.float(), strict=True):
            before = (self.earlier[f"{self.stack.branches}.{name}.{key}"] for key in "AB")
            by_rank = share.repeat_interleave(self.stack.rank)
            for value, old, dim in zip((layer.A, layer.B), before, (0, 1), strict=True):
                value.copy_(averaged(old.movedim(dim, -1), value.movedim(dim, -1), by_rank).movedim(-1, dim))

    def task_shares(self, tasks: Tensor) -> Tensor:
        """[batch, layers, experts]: (1 - share) c_t of the tasks of a batch, 0 for tasks that are still to come."""
        usage = self.usage_of_tasks()
        shares = (1 - self.share) * (usage / usage.sum(-1, keepdim=True).clamp(min=1)).float()
        learned = (tasks < len(shares))[:, None, None]
        return shares[tasks.clamp(max=len(shares) - 1)] * learned

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        if not (self.task_id_at_test and self.usage):
            return super().predict(batch, choices)
        self.task_weights = self.task_shares(torch.as_tensor(batch.tasks, device=self.objective.device))
        try:
            return super().predict(batch, choices)
        finally:
            self.task_weights = None


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest values of the last axis; of equal ones those of the lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True)


def tokens_of_experts(weights: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """[batch, experts]: tokens in `mask` [batch, length] for which an expert is among the `count` of largest weight."""
    chosen = largest(weights, count).float()
    chosen = chosen if mask is None else chosen * mask[..., None]
    return chosen.reshape(len(chosen), -1, chosen.shape[-1]).sum(1)


def with_task(by_input: Tensor, of_task: Tensor) -> Tensor:
    """[..., experts]: share w + (1 - share) c_t from w and (1 - share) c_t; w alone where the latter is 0."""
    return by_input * (1 - of_task.sum(-1, keepdim=True)) + of_task


def earlier_shares(used_before: Tensor, used_now: Tensor, momentum: float, roles: Roles) -> Tensor:
    """[..., experts]: the share g of the earlier values in every expert, from masks of those that tasks use."""
    preserved = used_before & ~used_now
    return torch.where(preserved if roles is Roles.comment else ~preserved, momentum, 1 - momentum)


def averaged(earlier: Tensor, trained: Tensor, share: Tensor) -> Tensor:
    """`share` [n] theta_{t-1} + (1 - `share`) phi_t for values [..., n]."""
    return share * earlier + (1 - share) * trained
