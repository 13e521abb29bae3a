"""Scores of the present model on tasks that it does not learn (evaluation.downstream=[benchmark/NAME])."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from clpet.config.schema import Split
from clpet.data.batches import EncodedDataset
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.errors import DataError
from clpet.escape import safe_name
from clpet.methods.base import Method
from clpet.objectives.base import Objective
from clpet.objectives.cost_meter import Meter
from clpet.runtime.distributed import get_world, without_gradients

UNKNOWN = -1  # number of the task: methods read that it is not known, and it is the last task of the objective


@dataclass(frozen=True)
class OutsideScore:
    """A task with its examples, and the objective that scores them, on the network of the run."""

    name: str
    metric: str
    objective: Objective
    pool: EncodedDataset

    @classmethod
    def of(cls, objective: Objective, outside: Benchmark, task: Task, split: Split, limit: int | None) -> Self:
        """The first `limit` examples of a task of the benchmark `outside`. Raises ConfigError and DataError."""
        name, learned = f"{outside.name}/{task.name}", objective.benchmark
        unknown = [label for label in task.labels if label not in learned.label_ids]
        if unknown and objective.traits.has_labels:
            raise DataError(
                f"evaluation.downstream: no task of {learned.name} has the label {safe_name(unknown[0])} of {name}: "
                "the head cannot answer it"
            )
        examples: Sequence[Example] = task.split(split.value)
        if not len(examples):
            raise DataError(f"evaluation.downstream: {name} has no {split.value} examples")
        examples = examples if limit is None else list(islice(examples, limit))
        task = replace(task, train=[], validation=[], test=examples)
        outside = replace(outside, reserved_positions=learned.reserved_positions, tasks=[task])
        objective.check_benchmark(outside, objective.evaluation)
        single = with_tasks(objective, outside)
        pool = single.encode().test
        scoring = with_tasks(objective, replace(single.benchmark, tasks=[*learned.tasks, *single.benchmark.tasks]))
        labels = [single.benchmark.labels[label] if label >= 0 else "" for label in pool.labels]
        pool.labels = np.array([scoring.benchmark.label_ids.get(label, -1) for label in labels], np.int64)
        pool.tasks = np.full(len(pool), UNKNOWN, np.int64)
        pool.texts, pool.cached_on_disk = [example.text for example in examples], False
        metric = scoring.benchmark.tasks[UNKNOWN].metric
        return cls(name, "accuracy" if objective.traits.has_labels else metric, scoring, pool)

    @without_gradients()
    def measure(self, method: Method, learned: int) -> float:
        """The score of the model after `learned` tasks; labels of tasks that are not learned yet do not compete."""
        columns: dict[str, list[np.ndarray]] = {}
        rows, labels = np.arange(len(self.pool)), method.benchmark.seen_labels(learned)
        with self._answering_for(method):
            self.objective.adapters.train_mode(False)
            method.before_evaluation(self.pool, rows)

            def answer(batch_rows: np.ndarray) -> dict[str, Any]:
                batch = self.pool.batch(batch_rows, self.objective.device)
                choices = method.choices(batch, labels)
                predictions = method.predict(batch, choices)
                scored = {**self.objective.score(batch, predictions, choices), **predictions.extras}
                return {name: values.cpu() if torch.is_tensor(values) else values for name, values in scored.items()}

            for scored in get_world().map(answer, method.batches(self.pool, rows)):
                for name, values in scored.items():
                    columns.setdefault(name, []).append(np.asarray(values))
            method.after_evaluation()
        table = {name: np.concatenate(pieces) for name, pieces in columns.items()}
        return self.objective.aggregate(table).value

    @contextlib.contextmanager
    def _answering_for(self, method: Method) -> Iterator[None]:
        """Inside, the method answers with the objective of this task, and passes are not counted as its cost."""
        run_objective, meter = method.objective, method.objective.meter
        method.objective = self.objective
        run_objective.meter, self.objective.meter = Meter(run_objective.device), Meter(run_objective.device)
        try:
            yield
        finally:
            method.objective, run_objective.meter = run_objective, meter


def with_tasks(objective: Objective, benchmark: Benchmark) -> Objective:
    """A copy of the objective for another benchmark, on the same network and with the same head."""
    other = copy.copy(objective)
    other.benchmark = objective.fit_length(benchmark)
    other.encode_split = other.encoder(other.benchmark, objective.backbone, objective.tokenizer)
    other.finish_setup()
    for name, value in vars(objective).items():
        if isinstance(value, nn.Module):
            setattr(other, name, value)
    return other
