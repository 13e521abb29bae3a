"""Evaluator: one pass over the test sets gives every task's score, in two views, and a row per example."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clpet.methods.base import Choices, Method
from clpet.tasks import Benchmark
from clpet.text import Encoded


@dataclass(frozen=True)
class TaskScore:
    """value in percent, and the counts behind it."""

    value: float
    correct: int
    total: int


@dataclass
class Evaluation:
    """Scores of one moment by task number: among all seen labels, and among each task's own labels."""

    seen: dict[int, TaskScore] = field(default_factory=dict)
    own: dict[int, TaskScore] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Scores a method on the test sets of a benchmark, all tasks in one pass of large batches sorted by length.

    The class-incremental view lets all labels seen so far compete: an unseen label can never win, so a task
    not yet learned scores 0. The task-incremental view takes the same predictions among the task's own labels.
    """

    def __init__(self, benchmark: Benchmark, data: Encoded, batch_size: int) -> None:
        self.benchmark, self.pool, self.batch_size = benchmark, data.test, batch_size
        self.own = torch.full((len(benchmark), len(benchmark.labels)), float("-inf"))
        for index in range(len(benchmark)):
            self.own[index, benchmark.task_labels(index)] = 0

    @torch.inference_mode()
    def __call__(self, method: Method, learned: int, tasks: list[int]) -> Evaluation:
        """Scores of `tasks` after the first `learned` tasks."""
        rows = self.pool.rows_of(*tasks)
        device = method.objective.device
        own_mask = self.own.to(device)
        labels = self.benchmark.seen_labels(learned)
        method.objective.meter.kind = "evaluated"
        method.before_evaluation(self.pool, rows)
        table: dict[str, list[Any]] = {}
        for part in self.pool.by_length(rows, self.batch_size):
            batch = self.pool.batch(part, device)
            choices = Choices(labels, batch.tasks if method.task_id_at_test else None)
            found = method.predict(batch, choices)
            known = method.predict_known_task(batch, found)
            best = _best(choices.mask(found.scores))
            columns = {
                "row": torch.as_tensor(part),
                "task": batch.tasks,
                "label": batch.labels,
                "prediction": best,
                "own_prediction": _best(known + own_mask[batch.tasks]),
                **found.trace,
            }
            for name, values in columns.items():
                table.setdefault(name, []).append(values.cpu())
        method.objective.meter.kind = "learned"
        return self._summary({name: torch.cat(parts).numpy() for name, parts in table.items()}, tasks, learned)

    def _summary(self, table: dict[str, np.ndarray], tasks: list[int], learned: int) -> Evaluation:
        order = np.argsort(table["row"])
        table = {name: values[order] for name, values in table.items()}
        result = Evaluation(rows=table)
        for index in tasks:
            inside = table["task"] == index
            for view, column in ((result.seen, "prediction"), (result.own, "own_prediction")):
                hits = table[column][inside] == table["label"][inside]
                view[index] = TaskScore(100 * float(hits.mean()), int(hits.sum()), int(hits.size))
        if "selected" in table:
            hits = table["selected"] == table["task"]
            shares = [hits[table["task"] == index].mean() for index in tasks if index < learned]
            result.diagnostics = {
                "selector_average": 100 * float(np.mean(shares)),
                "selector_whole": 100 * float(hits[table["task"] < learned].mean()),
            }
        return result


def _best(scores: torch.Tensor) -> torch.Tensor:
    """[batch]: the label with the highest score, the lowest one of a tie; -1 where no label can be answered."""
    value, label = scores.max(1)
    return torch.where(value == float("-inf"), -1, label)
