"""Method: the hooks of a continual-learning method. Every default is plain sequential fine-tuning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config import derive
from clpet.errors import ConfigError
from clpet.memory import NoReplay, Plan
from clpet.objectives.classification import Classification, Head
from clpet.tasks import Benchmark, Task
from clpet.text import Batch, Encoded
from clpet.training import Trainer


@dataclass
class Choices:
    """What may be answered: label ids, and each example's task only where the method is given it."""

    labels: Sequence[int]
    tasks: Tensor | None = None

    def mask(self, scores: Tensor) -> Tensor:
        """The scores with every label that may not be answered at minus infinity."""
        allowed = torch.full((scores.shape[1],), float("-inf"), device=scores.device)
        allowed[torch.as_tensor(self.labels, device=scores.device, dtype=torch.long)] = 0
        return scores + allowed


@dataclass
class Predictions:
    """[batch, all labels] scores, and per-example facts worth keeping (such as the selected module) by name."""

    scores: Tensor
    trace: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Method:
    """A subclass is a dataclass: its annotated fields are the knobs of its YAML."""

    name: str = ""

    objectives: ClassVar[tuple[str, ...]] = ("classification",)
    uses_replay: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False  # more than one adapter: refuses peft=none
    task_id_at_test: ClassVar[bool] = False  # results are task-incremental

    def check(self, objective: str, replay: str, peft: str) -> None:
        """Raises ConfigError for a combination that makes no sense, before anything is loaded."""
        if objective not in self.objectives:
            raise ConfigError(f"method={self.name} does not do {objective}; it does {', '.join(self.objectives)}")
        if replay != "none" and not self.uses_replay:
            raise ConfigError(f"method={self.name} replays nothing: leave out replay={replay}, or take method=replay")
        if peft == "none" and self.needs_adapter:
            raise ConfigError(f"method={self.name} keeps an adapter per task and cannot run with peft=none")

    def setup(
        self, objective: Classification, benchmark: Benchmark, data: Encoded, replay: NoReplay, seed: int
    ) -> None:
        """Attaches the first adapter; called once, before any evaluation."""
        self.objective, self.benchmark, self.data = objective, benchmark, data
        self.replay, self.seed = replay, seed
        self.first_adapter()

    def first_adapter(self) -> None:
        """The adapter that a fresh run evaluates and trains."""
        self.objective.adapters.add("default", derive(self.seed, "adapter", "default"))

    def curriculum(self) -> list[tuple[int, Task]]:
        """(position, task) in learning order; after each, row position + 1 of the matrix is measured."""
        return list(enumerate(self.benchmark.tasks))

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        """Learns one task. Several stages are several calls of trainer.fit."""
        self.objective.head.grow(self.benchmark.task_labels(index))
        self.fit(trainer, index)

    def fit(self, trainer: Trainer, index: int) -> None:
        """The usual stage: this method's plan, loss and hooks on its trainable parameters."""
        trainer.fit(
            self.plan(index),
            self.loss,
            self.parameters(),
            validate=lambda: self.validate(index),
            adjust_gradients=self.adjust_gradients,
            after_step=self.after_step,
        )

    def plan(self, index: int) -> Plan:
        """The batches of a task; replay mixes here."""
        return self.replay.plan(index)

    def stages(self, index: int) -> dict[str, Plan]:
        """The plans of a task's fits by stage name, to say beforehand how many steps it takes."""
        return {"": self.plan(index)}

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the batch; penalties and distillation are added here."""
        return self.objective.loss(batch)

    def adjust_gradients(self) -> None:
        """Projections and the like: after backward, before the optimiser's step."""

    def after_step(self) -> None:
        """Statistics of a step: gradients are still there, weights are already new."""

    def after_task(self, task: Task, index: int) -> None:
        """Memory selection, Fisher information, fusion, freezing."""
        self.replay.remember(index, self.vectors)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        adapter = self.objective.adapters.tensors("default").values()
        return [*adapter, *self.objective.head.parameters()]

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Scores over all labels; those outside `choices` are masked by the caller."""
        return Predictions(self.objective.scores(batch))

    def predict_known_task(self, batch: Batch, scores: Tensor) -> Tensor:
        """Scores for the task-incremental view; `scores` are those of `predict`, reused where they serve."""
        return scores

    def validate(self, index: int) -> float:
        """Average accuracy on the validation parts of the tasks this method trains on, for train.select=best."""
        tasks = range(index + 1) if self.replay.memory else [index]
        labels = self.benchmark.seen_labels(index + 1)

        def scores(batch: Batch) -> Tensor:
            return self.predict(batch, Choices(labels, batch.tasks if self.task_id_at_test else None)).scores

        return float(np.mean([self._validation_accuracy(task, labels, scores) for task in tasks]))

    @torch.inference_mode()
    def _validation_accuracy(self, task: int, labels: Sequence[int], scores: Callable[[Batch], Tensor]) -> float:
        pool = self.data.validation
        rows, correct = pool.rows_of(task), 0
        for part in pool.by_length(rows, 64):
            batch = pool.batch(part, self.objective.device)
            correct += int((Choices(labels).mask(scores(batch)).argmax(1) == batch.labels).sum())
        return correct / max(1, len(rows))

    @torch.inference_mode()
    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n, labels so far]: class logits of train rows, what a fixed memory is chosen on (ConPET, section 3.2)."""
        pool, objective = self.data.train, self.objective
        found: list[tuple[np.ndarray, np.ndarray]] = []
        order = np.argsort(-pool.lengths[rows], kind="stable")
        for start in range(0, len(rows), 64):
            part = order[start : start + 64]
            logits = self.class_logits(pool.batch(rows[part], objective.device))
            found.append((part, logits.float().cpu().numpy()))
        out = np.empty((len(rows), found[0][1].shape[1]))
        for part, values in found:
            out[part] = values
        return out

    def class_logits(self, batch: Batch) -> Tensor:
        """[batch, labels]: logits of the model as it has just been trained."""
        return self.objective.head(self.objective.features(batch))

    def trainable_parameters(self) -> int:
        """Number of scalars trained in the current task."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored_parameters(self) -> int:
        """Number of scalars this method must keep beside the frozen backbone."""
        adapters = self.objective.adapters
        held = sum(adapters.count(name) for name in adapters.names)
        return held + sum(parameter.numel() for parameter in self.objective.head.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Everything a later task needs: nested dicts of tensors, numbers, strings and lists."""
        return {"objective": self.objective.state(), "replay": self.replay.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on a method fresh from `setup`."""
        self.objective.load(state["objective"])
        self.replay.load(state["replay"])

    def heads(self) -> dict[str, Head]:
        """Heads by name, saved as safetensors at the end of the run."""
        return {"default": self.objective.head}
