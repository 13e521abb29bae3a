"""Method: the hooks of a continual-learning method. Every default is plain sequential fine-tuning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch, Encoded, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.objectives.base import Choices, Predictions
from clpet.objectives.classification import Head
from clpet.replay.base import NoReplay, ValidationRows
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.distributed import get_world, without_gradients
from clpet.training.trainer import Trainer


@dataclass
class Method:
    """A subclass is a dataclass: its annotated fields are the knobs of its YAML."""

    name: str = ""

    objectives: ClassVar[tuple[str, ...]] = ("classification", "text_to_text", "language_modeling")
    uses_replay: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False  # more than one adapter: refuses peft=none
    supported_pefts: ClassVar[tuple[str, ...]] = ()  # the peft options it goes with; empty: any that trains something
    supports_recompute: ClassVar[bool] = True  # a block's pass needs nothing set around it: it can be done again later
    task_id_at_test = False  # results are task-incremental; a subclass may make it a knob
    mergeable: ClassVar[bool] = True  # the same weights for every text: they can be merged, and asked by others
    uses_validation: ClassVar[bool] = True  # chooses an epoch where train.select=best
    cache_dir: ClassVar[str | None] = None  # set by the run: a folder for what other runs can use

    def check(self, objective: str, replay: str, peft: str) -> None:
        """Raises ConfigError for a combination that makes no sense, before anything is loaded."""
        if objective not in self.objectives:
            does = f"it does {', '.join(self.objectives)}, and method=sequential does all"
            raise ConfigError(f"method={self.name} does not do {objective}; {does}")
        if replay != "none" and not self.uses_replay:
            raise ConfigError(f"method={self.name} replays nothing: leave out replay={replay}, or take method=replay")
        if peft in ("none", "blocks") and self.needs_adapter:
            raise ConfigError(f"method={self.name} keeps an adapter per task and cannot run with peft={peft}")
        if self.supported_pefts and peft not in self.supported_pefts:
            raise ConfigError(f"method={self.name} needs peft={' or '.join(self.supported_pefts)}, not peft={peft}")
        if peft == "frozen" and peft not in self.supported_pefts:
            raise ConfigError(f"method={self.name} trains the model, and peft=frozen leaves nothing of it to train")

    def mixes_tasks(self, replay: str) -> bool:
        """Whether the loss sees examples of several tasks, so that benchmark.softmax=auto compares all seen labels."""
        return replay != "none"

    def check_benchmark(self, benchmark: Benchmark) -> None:
        """Raises ConfigError where the tasks do not allow what the knobs ask for, before the backbone is loaded."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints, by name, of files that the method reads: where one has changed a run is not resumed."""
        return {}

    def setup(self, objective: Any, benchmark: Benchmark, data: Encoded, replay: NoReplay, seed: int) -> None:
        """Attaches the first adapter; called once, before any evaluation."""
        self.objective, self.benchmark, self.data = objective, benchmark, data
        self.replay, self.seed = replay, seed
        self.init_adapters()

    def init_adapters(self) -> None:
        """The adapter that a fresh run evaluates and trains."""
        self.objective.adapters.add("default", derive(self.seed, "adapter", "default"))

    def resolved(self, benchmark: Benchmark) -> dict[str, Any]:
        """Options that were left to the method and what it chose from the data, for the header and the record."""
        return {}

    def curriculum(self) -> list[tuple[int, Task]]:
        """(position, task) in learning order; after each, row position + 1 of the matrix is measured."""
        return list(enumerate(self.benchmark.tasks))

    def evaluable_tasks(self, row: int, tasks: range) -> range:
        """Of the tasks whose scores are asked for after `row` tasks, those that this method has a model for."""
        return tasks

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        """Learns one task. Several stages are several calls of trainer.fit."""
        self.grow_head(index)
        self.fit(trainer, index)

    def grow_head(self, index: int) -> None:
        """Gives the labels of a task their rows."""
        self.objective.add_labels(self.benchmark.task_labels(index))

    def fit(self, trainer: Trainer, index: int) -> None:
        """The usual stage: this method's plan, loss and hooks on its trainable parameters."""
        trainer.fit(
            self.plan(index),
            self.loss,
            self.named_parameters(),
            validate=lambda: self.validate(index),
            adjust_gradients=self.adjust_gradients,
            after_step=self.after_step,
            after_batch=self.after_batch,
        )

    def plan(self, index: int) -> BatchPlan:
        """The batches of a task; replay mixes here."""
        return self.replay.plan(index)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        """The plans of a task's fits by stage name, to say beforehand how many steps it takes."""
        return {"": self.plan(index)}

    def logits(self, batch: Batch) -> Tensor:
        """[terms, classes]: what the softmax of the loss is taken over."""
        return self.objective.logits(batch)

    def loss(self, batch: Batch) -> Tensor:
        """The objective's cross-entropy, mean over its terms; penalties and distillation are added here."""
        return self.objective.loss(batch)

    def adjust_gradients(self) -> None:
        """Projections and the like: after backward, before the optimiser's step."""

    def after_step(self) -> None:
        """Statistics of a step: gradients are still there, weights are already new."""

    def after_batch(self) -> None:
        """The end of a step, also of one that was left out: gradients are gone."""

    def after_task(self, task: Task, index: int) -> None:
        """Memory selection, Fisher information, fusion, freezing."""
        self.replay.update_memory(index, self.vectors)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimiser moves, by name. A tensor that is new in a task needs a name of its own.

        With train.optimizer_state=carry the moments of AdamW follow the names from task to task.
        """
        return {**self.objective.adapters.tensors("default"), **self.objective.parameters()}

    def parameters(self) -> list[nn.Parameter]:
        """The values of `named_parameters`."""
        return list(self.named_parameters().values())

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Scores over all labels (those outside `choices` are masked by the caller), or texts."""
        return self.objective.predict(batch, choices)

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in the batches they are to be predicted in."""
        return self.objective.batches(pool, rows)

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """All rows of an evaluation that is about to begin, for a method that computes something in its own order."""

    def after_evaluation(self) -> None:
        """What `predict` has counted on each rank comes together."""

    def predict_known_task(self, batch: Batch, found: Predictions) -> Predictions:
        """Predictions for the task-incremental view; `found` is what `predict` gave, reused where it serves."""
        return found

    def choices(self, batch: Batch, labels: Sequence[int]) -> Choices:
        """What may be answered to a batch."""
        return Choices(labels, batch.tasks if self.task_id_at_test else None)

    def validate(self, index: int) -> float:
        """Average score over the tasks of the memory's validation examples, for train.select=best."""
        labels = self.benchmark.seen_labels(index + 1)

        def score(batch: Batch) -> Tensor:
            choices = self.choices(batch, labels)
            return self.objective.judge(batch, self.predict(batch, choices), choices)

        return self.average_score(self.validation(index), score)

    def validation(self, index: int) -> ValidationRows:
        """What the best epoch of task `index` is chosen on."""
        return self.replay.validation(index)

    @without_gradients()
    def average_score(self, parts: ValidationRows, score: Callable[[Batch], Tensor]) -> float:
        """Mean over tasks of the mean of `score`, which gives [batch] values."""
        hits: dict[int, list[Tensor]] = {}
        meter = self.objective.meter
        meter.kind = "validated"

        def right(place: tuple[EncodedDataset, np.ndarray]) -> dict[int, Tensor]:
            pool, part = place
            batch = pool.batch(part, self.objective.device)
            found = score(batch).float()
            return {task: found[batch.tasks == task] for task in np.unique(pool.tasks[part]).tolist()}

        for found in get_world().map(
            right, [(pool, part) for pool, rows in parts for part in self.batches(pool, rows)]
        ):
            for task, values in found.items():
                hits.setdefault(task, []).append(values)
        meter.kind = "learned"
        return float(np.mean([torch.cat(values).mean().item() for values in hits.values()]))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n, size]: `memory_vector` of train rows, what a fixed memory is chosen on."""
        return self.embed(rows, self.memory_vector).cpu().numpy()

    @torch.no_grad()
    def embed(self, rows: np.ndarray, vector: Callable[[Batch], Tensor]) -> Tensor:
        """[n, size] fp32: a vector of each train row under the present model."""
        pool = self.data.train
        order = np.argsort(-pool.lengths[rows], kind="stable")
        size = self.objective.eval_batch_size
        parts = [order[start : start + size] for start in range(0, len(rows), size)]
        found = get_world().map(lambda part: vector(pool.batch(rows[part], self.objective.device)).float(), parts)
        vectors = torch.cat(found).to(self.objective.device)
        return vectors[torch.from_numpy(np.argsort(np.concatenate(parts))).to(vectors.device)]

    def memory_vector(self, batch: Batch) -> Tensor:
        """[batch, labels]: class logits of the model as it has just been trained (ConPET, section 3.2)."""
        return self.logits(batch)

    def trainable_parameters(self) -> int:
        """Number of scalars trained in the current task."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored_parameters(self) -> int:
        """Number of scalars this method must keep beside the frozen backbone."""
        adapters = self.objective.adapters
        held = sum(adapters.count(name) for name in adapters.names)
        return held + sum(parameter.numel() for parameter in self.objective.parameters().values())

    def stored_examples(self) -> int:
        """Number of old examples kept."""
        return self.replay.stored()

    def save(self, folder: Path) -> None:
        """Writes what was trained of the backbone, for use without clpet."""
        self.objective.adapters.save(folder)

    def merged(self) -> Any:
        """The backbone with what was learned in its weights, where there is `mergeable`; nothing can follow."""
        return self.objective.adapters.merged()

    def diagnostics(self) -> dict[str, float]:
        """Figures about the task just learned, kept beside its scores."""
        return {}

    def figures(self) -> dict[str, dict[str, Any]]:
        """Figures to draw at the end of a run, as plain data for `reporting.plots.method_figures.draw`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything a later task needs: nested dicts of tensors, numbers, strings and lists."""
        return {"objective": self.objective.state(), "replay": self.replay.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on a method fresh from `setup`."""
        self.objective.load(state["objective"])
        self.replay.load(state["replay"])

    def task_state(self) -> dict[str, Any]:
        """What the hooks of a fit gather while it goes on, beside the trained tensors; as in `state_dict`."""
        return {}

    def load_task_state(self, state: dict[str, Any]) -> None:
        """The inverse of `task_state`, in the midst of `learn`, where the fit would begin."""

    def heads(self) -> dict[str, Head]:
        """Heads by name, saved as safetensors at the end of the run."""
        return self.objective.heads()
