"""Evaluator: one pass over a split gives every task's score, in two views, and a row per example."""

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
    """Scores of one moment by task number: among all seen labels, and among each task's own labels."""

    seen: dict[int, TaskScore] = field(default_factory=dict)
    own: dict[int, TaskScore] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Scores a method on a split of a benchmark, all tasks in one pass of large batches sorted by length.

    What a prediction is and how right it is are the objective's to say. Where labels are answered there are two
    views of the same predictions: class-incremental (all labels seen so far compete) and task-incremental (a
    task's own labels only).
    """

    def __init__(self, benchmark: Benchmark, data: Encoded, split: str = "test") -> None:
        self.benchmark, self.split, self.pool = benchmark, split, data.split(split)

    @without_gradients()
    def __call__(self, method: Method, learned: int, tasks: list[int]) -> Evaluation:
        """Scores of `tasks` after the first `learned` tasks."""
        objective, labels = method.objective, self.benchmark.seen_labels(learned)
        asked = self.pool.rows_of(*tasks)
        measured = self.split == objective.evaluation.split.value  # else it only helps to choose settings
        objective.meter.kind = "evaluated" if measured else "validated"
        method.before_evaluation(self.pool, asked)

        def judged(part: np.ndarray) -> dict[str, Any]:
            batch = self.pool.batch(part, objective.device)
            choices = method.choices(batch, labels)
            found = method.predict(batch, choices)
            columns = objective.table(batch, found, method.predict_known_task(batch, found), choices)
            columns = {"row": part, "task": batch.tasks, **columns, **found.trace}
            return {name: values.cpu() if torch.is_tensor(values) else values for name, values in columns.items()}

        table: dict[str, list[Any]] = {}
        for columns in get_world().map(judged, method.batches(self.pool, asked)):
            for name, values in columns.items():
                table.setdefault(name, []).append(values)
        if measured:
            probed = objective.probe(lambda batch: method.predict(batch, method.choices(batch, labels)))
        method.after_evaluation()
        objective.meter.kind = "learned"
        rows = {name: np.concatenate([np.asarray(part) for part in parts]) for name, parts in table.items()}
        result = self._summary(method, rows, tasks, learned)
        result.diagnostics |= probed if measured else {}
        return result

    def _summary(self, method: Method, table: dict[str, np.ndarray], tasks: list[int], learned: int) -> Evaluation:
        order = np.argsort(table["row"])
        table = {name: values[order] for name, values in table.items()}
        result = Evaluation(rows=table)
        for index in tasks:
            rows = {name: values[table["task"] == index] for name, values in table.items()}
            result.seen[index] = method.objective.summary(rows)
            result.own[index] = method.objective.summary(rows, own=True)
            more = method.objective.diagnostics(rows)
            result.diagnostics |= {f"{key}/{self.benchmark.names[index]}": value for key, value in more.items()}
        if "selected" in table:
            hits = table["selected"] == table["task"]
            shares = [hits[table["task"] == index].mean() for index in tasks if index < learned]
            result.diagnostics |= {
                "selector_average": 100 * float(np.mean(shares)),
                "selector_whole": 100 * float(hits[table["task"] < learned].mean()),
            }
        return result
