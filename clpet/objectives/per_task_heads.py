"""Head rows by the task that brought them: earlier ones are frozen, so that their bits stay."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.objectives.classification import Classification, Head


class TaskHeads:
    """A head per task: the rows of its new labels, or, where `apart`, of all its labels, for a task id at test."""

    def __init__(self, objective: Classification, apart: bool) -> None:
        self.objective, self.apart = objective, apart
        self.heads: list[Head] = []

    def grow(self, labels: list[int], seen: bool) -> None:
        """Rows for a task, which alone are trained from now on; its softmax is over its labels, or all `seen`."""
        for head in self.heads:
            head.requires_grad_(False)
        held = [] if self.apart else [label for head in self.heads for label in head.labels]
        self.heads.append(self.objective.new_head(self.objective.seed))
        self.heads[-1].grow([label for label in labels if label not in held])
        self.compete({*labels, *(held if seen else [])})

    def compete(self, labels: set[int]) -> None:
        """The loss is a softmax over the columns of `labels` among the rows of `competing` heads."""
        heads = self.heads[-1:] if self.apart else self.heads
        self.competing = [head for head in heads if labels.intersection(head.labels)]
        rows = [label for head in self.competing for label in head.labels]
        columns = [column for column, label in enumerate(rows) if label in labels]
        place = torch.full((len(self.objective.benchmark.labels),), -1)
        place[[rows[column] for column in columns]] = torch.arange(len(columns))
        self.columns, self.place = (x.to(self.objective.device) for x in (torch.tensor(columns), place))

    def loss(self, h: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of representations [batch, dim]."""
        logits = torch.cat([head(h) for head in self.competing], dim=1)
        return F.cross_entropy(logits[:, self.columns], self.place[labels])

    def scores(self, h: Tensor, tasks: Tensor | None) -> Tensor:
        """[batch, all labels]; of a label that no head has, by the row it would start from.

        Where `tasks` are given other labels cannot win, and a task of heads `apart` is scored by its own.
        """
        logits = self.objective.head.scatter(h)
        for index, head in enumerate(self.heads):
            if not self.apart:
                logits[:, head.labels] = head(h)
            elif tasks is not None:
                logits[:, head.labels] = torch.where((tasks == index)[:, None], head(h), logits[:, head.labels])
        return logits if tasks is None else logits + self.objective.own[tasks]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The rows of the newest task."""
        found = {f"head{len(self.heads)}.{name}": p for head in self.heads[-1:] for name, p in head.named_parameters()}
        return {name: value for name, value in found.items() if value.numel()}

    def count(self) -> int:
        """Scalars in all rows."""
        return sum(value.numel() for head in self.heads for value in head.parameters())

    def state(self) -> list[dict[str, Any]]:
        """Rows and labels of every task."""
        return [head.state() for head in self.heads]

    def load(self, state: list[dict[str, Any]]) -> None:
        """The inverse of `state`."""
        self.heads = [self.objective.new_head(self.objective.seed) for _ in state]
        for head, saved in zip(self.heads, state, strict=True):
            head.load(saved)
