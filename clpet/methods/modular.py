"""Modular: base of methods with a module (adapter and head) per task, which route each input to one or more modules."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.methods.saved_state import Growing
from clpet.objectives.base import Predictions
from clpet.objectives.classification import MISSING, Classification, Head
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


def module_name(index: int) -> str:
    """The adapter of task `index`."""
    return f"task{index:03d}"


@dataclass
class Modular(Method[Classification]):
    """Module j = {adapter_j, head_j over the labels of task j}; it is frozen after task j."""

    needs_labels: ClassVar[bool] = True
    needs_adapter: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    rounds_with_unseen_labels: ClassVar[bool] = True  # a readout has the initial rows of labels to come
    saved: ClassVar[tuple[str, ...]] = ("modules",)

    def init_adapters(self) -> None:
        """Attaches nothing before the first task: row 0 of the matrix is the bare backbone."""
        self.modules: list[Head] = Growing(lambda: self.objective.new_head(self.seed))
        self.start = self.objective.new_head(self.seed).start  # [labels, dim + 1]: initial row of every label

    def add_module(self, index: int) -> None:
        """Adds a new module for task `index`, active and trainable."""
        self.objective.adapters.add(module_name(index), derive(self.seed, "adapter", index))
        head = self.objective.new_head(self.seed)
        head.grow(self.benchmark.task_labels(index))
        self.modules.append(head)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_module(index)
        self.fit(trainer, index)

    def loss(self, context: StepContext) -> Tensor:
        """Cross-entropy over the labels of the current task."""
        batch = context.batch
        return self.objective.mean_cross_entropy(self.logits(batch), self.modules[-1].columns(batch.labels), batch)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        name = module_name(len(self.modules) - 1)
        module = {**self.objective.adapters.tensors(name), **dict(self.modules[-1].named_parameters())}
        return {f"{name}.{key}": value for key, value in module.items()}

    def logits(self, batch: Batch) -> Tensor:
        """[batch, labels of the newest task]: logits of its module, whose adapter must be active."""
        logits: Tensor = self.modules[-1](self.objective.features(batch))
        return logits

    def route(self, batch: Batch, selected: Tensor) -> Tensor:
        """[batch, all labels]: raw logits of the modules `selected` [batch, K], MISSING elsewhere.

        Each module runs once, on the examples that selected it. Labels of tasks that have no module yet are scored by
        the initial rows of their future head; a selected task without a module is scored with the bare backbone.
        """
        scores = torch.full((len(batch), len(self.start)), MISSING, device=batch.labels.device)
        seen = {label for head in self.modules for label in head.labels}
        for index in selected.unique().tolist():
            rows = (selected == index).any(1).nonzero().squeeze(1)
            subset = batch if len(rows) == len(batch) else batch.select(rows)
            trained = self.modules[index].labels if index < len(self.modules) else []
            labels = self.scored_labels(index)
            # Labels that a later module has learned are left to that module.
            columns = [column for column, label in enumerate(labels) if label in trained or label not in seen]
            cells = rows[:, None], torch.tensor(labels, dtype=torch.long, device=rows.device)[columns]
            logits = self.module_logits(subset, index)[:, columns]
            scores[cells] = torch.maximum(scores[cells], logits)  # a label of two modules gets the larger logit
        return scores

    def scored_labels(self, index: int) -> list[int]:
        """Labels that module `index` scores: those it was trained on, then those without a module at that time."""
        heads = self.modules[: index + 1]
        seen = {label for head in heads for label in head.labels}
        trained = heads[index].labels if index < len(heads) else []
        return [*trained, *(label for label in range(len(self.start)) if label not in seen)]

    def readout(self, index: int) -> tuple[Tensor, Tensor]:
        """W, b of module `index`, one row per label of `scored_labels`."""
        labels = self.scored_labels(index)
        if index >= len(self.modules):
            return self.start[labels, :-1], self.start[labels, -1]
        head = self.modules[index]
        later = self.start[labels[len(head.labels) :]]
        return torch.cat([head.weight, later[:, :-1]]), torch.cat([head.bias, later[:, -1]])

    def module_logits(self, batch: Batch, index: int) -> Tensor:
        """[batch, `scored_labels`]: logits of module `index`, or of the bare backbone if it does not exist yet."""
        adapters = self.objective.adapters
        with adapters.using(module_name(index)) if index < len(self.modules) else adapters.off():
            return F.linear(self.objective.features(batch), *self.readout(index))

    def predict_known_task(self, batch: Batch, predictions: Predictions) -> Predictions:
        """Scores of each example's own task's module; only examples that were routed to other modules run again."""
        if predictions.modules is None or predictions.scores is None:
            return predictions
        routed = (predictions.modules == batch.tasks[:, None]).any(1)
        missed = (~routed & (batch.tasks < len(self.modules))).nonzero().squeeze(1)
        scores = predictions.scores
        if len(missed):
            scores = scores.clone()
            subset = batch if len(missed) == len(batch) else batch.select(missed)
            scores[missed] = self.route(subset, batch.tasks[missed][:, None])
        return Predictions(scores)

    def heads(self) -> dict[str, Head]:
        return {module_name(index): head for index, head in enumerate(self.modules)}
