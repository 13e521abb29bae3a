"""Methods that keep a module (adapter and head) per task and route each input to one or more of them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.base import Method, Predictions
from clpet.objectives.classification import MISSING, Head
from clpet.training.trainer import Trainer


def module_name(index: int) -> str:
    """The adapter of task `index`."""
    return f"task{index:03d}"


@dataclass
class Modular(Method):
    """Module j = {adapter_j, head_j over the labels of task j}, frozen after task j."""

    objectives: ClassVar[tuple[str, ...]] = ("classification",)
    needs_adapter: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    def init_adapters(self) -> None:
        """Nothing to attach before the first task: row 0 is the bare backbone."""
        self.modules: list[Head] = []
        self.start = self.objective.new_head(self.seed).start  # rows that a module's head would start from

    def add_module(self, index: int) -> None:
        """A fresh module for task `index`, active and trainable."""
        self.objective.adapters.add(module_name(index), derive(self.seed, "adapter", index))
        head = self.objective.new_head(self.seed)
        head.grow(self.benchmark.task_labels(index))
        self.modules.append(head)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_module(index)
        self.fit(trainer, index)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy inside the current task's own labels."""
        return F.cross_entropy(self.logits(batch), self.modules[-1].columns(batch.labels))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        name = module_name(len(self.modules) - 1)
        own = {**self.objective.adapters.tensors(name), **dict(self.modules[-1].named_parameters())}
        return {f"{name}.{key}": value for key, value in own.items()}

    def logits(self, batch: Batch) -> Tensor:
        """[batch, labels of the newest task]: its module's logits, which must be active."""
        return self.modules[-1](self.objective.features(batch))

    def route(self, batch: Batch, selected: Tensor) -> Tensor:
        """[batch, all labels]: raw logits of the selected modules [batch, K], MISSING elsewhere.

        Each module runs once, on the examples that selected it. Labels of tasks without a module yet are scored
        by the rows their head would start from; a task without a module reads the bare backbone.
        """
        scores = torch.full((len(batch), len(self.start)), MISSING, device=batch.labels.device)
        seen = {label for head in self.modules for label in head.labels}
        for index in selected.unique().tolist():
            keep = (selected == index).any(1).nonzero().squeeze(1)
            part = batch if len(keep) == len(batch) else batch.select(keep)
            own = self.modules[index].labels if index < len(self.modules) else []
            labels = self.answered(index)
            columns = [column for column, label in enumerate(labels) if label in own or label not in seen]
            place = keep[:, None], torch.tensor(labels, dtype=torch.long, device=keep.device)[columns]
            answers = self.answers(part, index)[:, columns]
            scores[place] = torch.maximum(scores[place], answers)  # a label in two modules: the better one
        return scores

    def answered(self, index: int) -> list[int]:
        """Labels that module `index` scores: its own, then those that had no module when it was trained."""
        heads = self.modules[: index + 1]
        taken = {label for head in heads for label in head.labels}
        own = heads[index].labels if index < len(heads) else []
        return [*own, *(label for label in range(len(self.start)) if label not in taken)]

    def readout(self, index: int) -> tuple[Tensor, Tensor]:
        """W, b of module `index`, a row per label of `answered`."""
        labels = self.answered(index)
        if index >= len(self.modules):
            return self.start[labels, :-1], self.start[labels, -1]
        head = self.modules[index]
        later = self.start[labels[len(head.labels) :]]
        return torch.cat([head.weight, later[:, :-1]]), torch.cat([head.bias, later[:, -1]])

    def answers(self, batch: Batch, index: int) -> Tensor:
        """[batch, labels of `answered`]: logits of module `index`, of the bare backbone where there is none yet."""
        adapters = self.objective.adapters
        with adapters.using(module_name(index)) if index < len(self.modules) else adapters.off():
            return F.linear(self.objective.features(batch), *self.readout(index))

    def predict_known_task(self, batch: Batch, found: Predictions) -> Predictions:
        """Every example through its own task's module; only examples that were routed elsewhere run again."""
        if found.modules is None or found.scores is None:
            return found
        routed = (found.modules == batch.tasks[:, None]).any(1)
        missed = (~routed & (batch.tasks < len(self.modules))).nonzero().squeeze(1)
        scores = found.scores
        if len(missed):
            scores = scores.clone()
            part = batch if len(missed) == len(batch) else batch.select(missed)
            scores[missed] = self.route(part, batch.tasks[missed][:, None])
        return Predictions(scores)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(p.numel() for head in self.modules for p in head.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "modules": [head.state() for head in self.modules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for saved in state["modules"]:
            head = self.objective.new_head(self.seed)
            head.load(saved)
            self.modules.append(head)

    def heads(self) -> dict[str, Head]:
        return {module_name(index): head for index, head in enumerate(self.modules)}
