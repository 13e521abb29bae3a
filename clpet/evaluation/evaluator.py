"""Evaluates a method on a split of a benchmark: a score per task in two views, and a row per example."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.methods.base import Method
from clpet.objectives.base import TaskScore
from clpet.runtime.distributed import get_world, without_gradients


@dataclass
class Evaluation:
    """Scores by task number, in the class-incremental (`seen`) and the task-incremental (`per_task`) view."""

    seen: dict[int, TaskScore] = field(default_factory=dict)
    per_task: dict[int, TaskScore] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # columns, with one value per example
    diagnostics: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Evaluates a method on several tasks in one pass of large batches, sorted by length.

    The objective defines predictions and scores. For label predictions there are two views: class-incremental (all
    labels seen so far compete) and task-incremental (only the labels of the example's task).
    """

    def __init__(self, benchmark: Benchmark, data: Encoded, split: str = "test") -> None:
        self.benchmark, self.split, self.pool = benchmark, split, data.split(split)

    @without_gradients()
    def __call__(self, method: Method, learned: int, tasks: list[int]) -> Evaluation:
        """Scores of `tasks` after the first `learned` tasks."""
        is_main_split = self.split == method.objective.evaluation.split.value  # otherwise only for choosing settings
        with method.objective.meter.counting("evaluated" if is_main_split else "validated"):
            table, extra = self._predict(method, self.benchmark.seen_labels(learned), tasks, is_main_split)
        evaluation = self._aggregate(method, table, tasks, learned)
        evaluation.diagnostics |= extra
        return evaluation

    def _predict(
        self, method: Method, labels: list[int], tasks: list[int], with_extra: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The columns of all examples of `tasks`, and with `with_extra` the objective's further metrics."""
        objective, rows = method.objective, self.pool.rows_of(*tasks)
        method.before_evaluation(self.pool, rows)

        def evaluate_batch(batch_rows: np.ndarray) -> dict[str, Any]:
            batch = self.pool.batch(batch_rows, objective.device)
            choices = method.choices(batch, labels)
            predictions = method.predict(batch, choices)
            columns = objective.score(batch, predictions, choices, method.predict_known_task(batch, predictions))
            columns = {name: values for name, values in columns.items() if name not in objective.unrecorded}
            columns = {"row": batch_rows, "task": batch.tasks, **columns, **predictions.extras}
            return {name: values.cpu() if torch.is_tensor(values) else values for name, values in columns.items()}

        pieces: dict[str, list[Any]] = {}
        for columns in get_world().map(evaluate_batch, method.batches(self.pool, rows)):
            for name, values in columns.items():
                pieces.setdefault(name, []).append(values)
        extra: dict[str, float] = {}
        if with_extra:
            extra = objective.extra_evaluation(lambda batch: method.predict(batch, method.choices(batch, labels)))
        method.after_evaluation()
        return {name: np.concatenate([np.asarray(values) for values in lists]) for name, lists in pieces.items()}, extra

    def _aggregate(self, method: Method, table: dict[str, np.ndarray], tasks: list[int], learned: int) -> Evaluation:
        """Scores and diagnostics of every task from the columns, which are sorted by row first."""
        order = np.argsort(table["row"])
        table = {name: values[order] for name, values in table.items()}
        evaluation = Evaluation(rows=table)
        for index in tasks:
            rows = {name: values[table["task"] == index] for name, values in table.items()}
            evaluation.seen[index] = method.objective.aggregate(rows)
            evaluation.per_task[index] = method.objective.aggregate(rows, task_incremental=True)
            diagnostics = method.objective.diagnostics(rows)
            evaluation.diagnostics |= {f"{key}/{self.benchmark.names[index]}": x for key, x in diagnostics.items()}
        f1_keys = [f"macro_f1/{self.benchmark.names[index]}" for index in tasks if index < learned]
        if f1 := [evaluation.diagnostics[key] for key in f1_keys if key in evaluation.diagnostics]:
            evaluation.diagnostics["macro_f1"] = sum(f1) / len(f1)
        if "selected" in table:  # the task that the method has selected for each example
            hits = table["selected"] == table["task"]
            shares = [hits[table["task"] == index].mean() for index in tasks if index < learned]
            evaluation.diagnostics |= {
                "selector_average": 100 * float(np.mean(shares)),
                "selector_whole": 100 * float(hits[table["task"] < learned].mean()),
            }
        return evaluation
