"""The work that a run has ahead of it, counted before it starts: steps, training tokens, evaluated tokens."""

import logging
from collections.abc import Callable, Iterator

from clpet.config.schema import EvaluationOptions, Matrix
from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.replay.batch_plan import BatchPlan
from clpet.replay.exemplar_selection import random_features
from clpet.reporting.forecast import TaskWork

log = logging.getLogger(__name__)


def planned_stages(
    method: Method, at_end: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Task, dict[str, BatchPlan]]]:
    """(index, task, plan of every stage) in learning order, before anything is learned.

    The number of steps can depend on the size of the replay memory, so the memory is filled task by task, choosing
    exemplars by random features instead of the model's, and emptied again at the end, after a call of `at_end`.
    """
    try:
        for index, task in method.curriculum():
            yield index, task, method.stages(index)
            method.replay.update_memory(index, random_features)
        at_end()
    finally:
        method.replay.setup(method.data, method.seed, method.replay.batch_size)


def measured_tasks(evaluation: EvaluationOptions, method: Method, total: int, row: int) -> range:
    """The cells of row `row` of a matrix of `total` tasks that evaluation.matrix and evaluation.every select."""
    kind = evaluation.matrix
    tasks = range(total if kind is Matrix.full or row == total else row if kind is Matrix.seen else 0)
    if row % evaluation.every and row < total and tasks:
        tasks = range(row - 1, row)
    return method.evaluable_tasks(row, tasks)


def plan_work(
    method: Method, epochs_of: Callable[[int], int], evaluated_tokens: Callable[[int], float]
) -> tuple[list[TaskWork], list[int]]:
    """The planned work of every task, and its optimiser steps; both are empty if a method cannot plan ahead.

    `evaluated_tokens` gives the tokens of an evaluation by its row in the matrix.
    """
    works, steps = [], []
    try:
        for index, _, stages in planned_stages(method):
            epochs = epochs_of(index)
            tokens = {name: epochs * _tokens_per_epoch(plan) for name, plan in stages.items()}
            works.append(TaskWork(tokens, evaluated_tokens(index + 1)))
            steps.append(epochs * sum(plan.steps for plan in stages.values()))
    except Exception as error:  # a method of the user may need what it has learned; the plan is only for the screen
        log.info("the steps of later tasks cannot be planned: %s", error)
        return [], []
    return works, steps


def _tokens_per_epoch(plan: BatchPlan) -> float:
    return float(sum(plan.pool.lengths[rows].sum() for rows in plan.epoch(0)))
