"""One classification head per task, with the rows that the task added; the heads of earlier tasks are frozen."""

import torch
from torch import Tensor, nn

from clpet.data.batches import Batch
from clpet.objectives.base import HeadState
from clpet.objectives.classification import Classification, Head


class TaskHeads:
    """A head per task with rows for its new labels; if `disjoint`, for all its labels, used with task ids at test."""

    def __init__(self, objective: Classification, disjoint: bool) -> None:
        self.objective, self.disjoint = objective, disjoint
        self.heads: list[Head] = []

    def grow(self, labels: list[int], seen: bool) -> None:
        """Adds the head of a task and freezes the others; the softmax is over its labels, if `seen` over all."""
        for head in self.heads:
            head.requires_grad_(False)
        old_labels = [] if self.disjoint else [label for head in self.heads for label in head.labels]
        self.heads.append(self.objective.new_head(self.objective.seed))
        self.heads[-1].grow([label for label in labels if label not in old_labels])
        self.compete({*labels, *(old_labels if seen else [])})

    def compete(self, labels: set[int]) -> None:
        """Restricts the softmax of the loss to `labels`, and the forward pass to the heads that have one of them."""
        heads = self.heads[-1:] if self.disjoint else self.heads
        self.competing = [head for head in heads if labels.intersection(head.labels)]
        rows = [label for head in self.competing for label in head.labels]
        columns = [column for column, label in enumerate(rows) if label in labels]
        target = torch.full((len(self.objective.benchmark.labels),), -1)  # label id -> index among the columns
        target[[rows[column] for column in columns]] = torch.arange(len(columns))
        self.columns, self.target = (x.to(self.objective.device) for x in (torch.tensor(columns), target))

    def loss(self, h: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch with representations `h` [batch, dim]."""
        logits = torch.cat([head(h) for head in self.competing], dim=1)
        return self.objective.mean_cross_entropy(logits[:, self.columns], self.target[batch.labels], batch)

    def scores(self, h: Tensor, tasks: Tensor | None) -> Tensor:
        """[batch, all labels]; labels that no head has are scored by their initial rows.

        With `tasks` the labels of other tasks get minus infinity, and a disjoint head scores only its own task.
        """
        logits = self.objective.head.scatter(h)
        for index, head in enumerate(self.heads):
            if not self.disjoint:
                logits[:, head.labels] = head(h)
            elif tasks is not None:
                logits[:, head.labels] = torch.where((tasks == index)[:, None], head(h), logits[:, head.labels])
        return logits if tasks is None else logits + self.objective.task_label_mask[tasks]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the newest head."""
        parameters = {
            f"head{len(self.heads)}.{name}": p for head in self.heads[-1:] for name, p in head.named_parameters()
        }
        return {name: value for name, value in parameters.items() if value.numel()}

    def count(self) -> int:
        """Number of scalars in all heads."""
        return sum(value.numel() for head in self.heads for value in head.parameters())

    def state(self) -> list[HeadState]:
        """State of every head."""
        return [head.state() for head in self.heads]

    def load(self, state: list[HeadState]) -> None:
        """Restores what `state` returned."""
        self.heads = [self.objective.new_head(self.objective.seed) for _ in state]
        for head, saved in zip(self.heads, state, strict=True):
            head.load(saved)
