"""The estimate of a dry run: what a whole run will need, from a few steps of its first tasks.

The tasks are learned one after the other as in a run, with all hooks of the method, but from few examples: the longest
of every task, some of every label, and some batches of usual length. Memory is measured on the heaviest batch of
every fit and of the evaluation; what a method keeps grows by an equal amount per task. Seconds and operations of
steps are scaled by padded tokens, those of other passes by examples.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from clpet.config.schema import Select
from clpet.data.batches import EncodedDataset
from clpet.evaluation.evaluator import Evaluator
from clpet.records import Tree
from clpet.replay.batch_plan import BatchPlan
from clpet.reporting.estimates import MB, Estimate
from clpet.runs.planning import measured_tasks, planned_stages
from clpet.runs.run_dir import BYTES_PER_TOKEN
from clpet.runtime.distributed import get_world
from clpet.runtime.tensor_memory import PeakMemory
from clpet.runtime.tree_size import tree_bytes
from clpet.training.rehearsal import Rehearsal, Sample, batch_tokens, heaviest_tokens
from clpet.wiring import Session

BUDGET = 60.0  # seconds after which no further task is rehearsed
FEWEST = 3  # tasks are rehearsed in any case, to see what a method adds per task
PER_LABEL = 4  # examples of every label that remain
USUAL = 3  # batches of usual length that remain of every task
MOST_BATCHES = 1000  # batches of a fit whose tokens are counted; of longer ones every n-th


@dataclass
class Work:
    """What a run has ahead of it. Per task: the padded tokens of its stages on this rank, and its examples."""

    stages: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    examples: list[int] = field(default_factory=list)
    heaviest: list[int] = field(default_factory=list)  # padded tokens of the largest micro-batch
    evaluation: float = 0.0
    validation: float = 0.0
    replay_state: int = 0  # bytes of the row numbers of stored examples, after the last task
    replay_tokens: int = 0
    planned: bool = True


@dataclass
class Rehearsed:
    """Measured while a task was learned from few examples, in bytes and operations of this rank.

    `in_use` is in use afterwards, `stored` is the method's state without row numbers of examples, `at_step` what is
    in use before a step on the heaviest batch, to which `activations` are added; `other_flops` are those outside of
    steps.
    """

    in_use: int
    stored: int
    peak: int
    at_step: int
    activations: int
    other_flops: float
    examples: int


@dataclass
class Evaluated:
    """The evaluation of two batches: padded tokens of a rank, their seconds, and the peak."""

    tokens: float
    seconds: float
    peak: int


def estimate(session: Session) -> Estimate:
    """Rehearses the first tasks of a run that is about to begin, and extrapolates. All ranks must make this call."""
    trainer, objective = session.trainer, session.method.objective
    assert isinstance(trainer, Rehearsal)
    work, usual = plan_work(session)
    memory = PeakMemory(objective.device)
    trainer.prepare(memory)
    memory.hold(objective.adapters.model)
    _keep_few(session, usual)
    curriculum, tasks, start = session.method.curriculum(), [], time.monotonic()
    for number, (index, _) in enumerate(curriculum, 1):
        tasks.append(_rehearse(session, trainer, index, number == len(curriculum)))
        late = get_world().all_reduce_max(time.monotonic() - start)[0] > BUDGET
        if number >= FEWEST and late:
            break
    evaluated = _evaluate(session, memory, curriculum[len(tasks) - 1][0] + 1)
    memory.stop()
    return _extrapolated(session, work, tasks, evaluated)


def plan_work(session: Session) -> tuple[Work, dict[int, list[np.ndarray]]]:
    """The work of the run, and of every task some batches of usual length."""
    method, train = session.method, session.config.train
    work, usual = Work(), {}

    def memorise() -> None:
        if not method.uses_replay:
            return
        work.replay_state = tree_bytes(cast(Tree, method.replay.state()))
        work.replay_tokens = int(method.data.train.lengths[method.stored_rows()].sum())

    try:
        for index, _, stages in planned_stages(method, memorise):
            epochs = train.epochs_of(index)
            counted = {name: _tokens(session, plan) for name, plan in stages.items()}
            work.stages.append({name: epochs * total for name, (total, _) in counted.items()})
            work.heaviest.append(max((heaviest for _, heaviest in counted.values()), default=0))
            work.steps += epochs * sum(plan.steps for plan in stages.values())
            work.examples.append(len(_examples(session, index)))
            usual[index] = [rows for plan in stages.values() for rows in _usual(plan)]
            if train.select is Select.best and method.uses_validation:
                rounds = (epochs + 1) * len(stages)
                work.validation += rounds * sum(_padded(session, *piece) for piece in method.validation(index))
    except Exception:  # a method of the user may need what it has learned
        work.planned = False
    pool = session.data.split(session.split)
    for index in [0, *(index + 1 for index, _ in method.curriculum())]:
        rows = pool.rows_of(*measured_tasks(session.config.evaluation, method, len(session.benchmark), index))
        work.evaluation += _padded(session, pool, rows)
    return work, usual


def _tokens(session: Session, plan: BatchPlan) -> tuple[float, int]:
    """Padded tokens of an epoch of this rank, and those of its largest micro-batch."""
    batches, objective = plan.epoch(0), session.method.objective
    every = max(1, len(batches) // MOST_BATCHES)
    total = sum(batch_tokens(objective, plan.pool, rows) for rows in batches[::every])
    longest = max(batches, key=lambda rows: int(plan.pool.lengths[rows].max()), default=None)
    heaviest = 0 if longest is None else heaviest_tokens(objective, plan.pool, longest)
    return total * len(batches) / max(1, len(batches[::every])), heaviest


def _usual(plan: BatchPlan) -> list[np.ndarray]:
    batches = plan.epoch(0)
    count = USUAL if batches else 0
    positions = np.linspace(0, max(0, len(batches) - 1), count).round().astype(int)
    return [batches[position] for position in positions]


def _padded(session: Session, pool: EncodedDataset, rows: np.ndarray) -> float:
    """Padded tokens of rows that are predicted; of all ranks together."""
    batches = session.method.batches(pool, rows) if len(rows) else []
    return float(sum(pool.padded_tokens(batch) for batch in batches))


def _keep_few(session: Session, usual: dict[int, list[np.ndarray]]) -> None:
    """Hides all but few examples from the method: rows whose task is -1 belong to no task."""
    size, data = session.config.train.global_batch_size, session.data
    for pool, count in ((data.train, size), (data.validation, session.method.objective.eval_batch_size)):
        remaining = [np.concatenate(batches) for batches in usual.values() if batches and pool is data.train]
        for task in np.unique(pool.tasks):
            rows = pool.rows_of(task)
            remaining.append(rows[np.argsort(-pool.lengths[rows], kind="stable")[:count]])
            if session.benchmark.traits.has_labels:
                remaining += [rows[pool.labels[rows] == label][:PER_LABEL] for label in np.unique(pool.labels[rows])]
        _keep(pool, remaining)


def _keep(pool: EncodedDataset, rows: Iterable[np.ndarray]) -> None:
    inside = np.isin(np.arange(len(pool)), np.concatenate([np.empty(0, np.int64), *rows]))
    pool.tasks = np.where(inside, pool.tasks, -1)


def _examples(session: Session, index: int) -> np.ndarray:
    """Train rows that are new in an entry of the curriculum."""
    earlier = [number for number, _ in session.method.curriculum() if number < index]
    return session.data.train.rows_of(*range(max(earlier, default=-1) + 1, index + 1))


def _rehearse(session: Session, trainer: Rehearsal, index: int, last: bool) -> Rehearsed:
    """Learns a task from the examples that are left, and measures it."""
    method, memory = session.method, trainer.memory
    trainer.at_step = trainer.activations = 0
    trainer.fit_flops = 0.0
    memory.reset()
    memory.start()
    session.learn(index, last)
    cost = method.objective.meter.cost
    other = max(0.0, cost.forward_flops + cost.backward_flops - trainer.fit_flops)
    stored = tree_bytes(method.state_dict()) - tree_bytes(cast(Tree, method.replay.state()))
    return Rehearsed(memory.now, stored, memory.peak, trainer.at_step, trainer.activations, other,
                     len(_examples(session, index)))  # fmt: skip


def _evaluate(session: Session, memory: PeakMemory, learned: int) -> Evaluated:
    """Evaluates the heaviest batch and one of usual length; twice where measuring memory takes time."""
    method, pool = session.method, session.data.split(session.split)
    tasks = list(method.evaluable_tasks(learned, range(len(session.benchmark)))) or [0]
    batches = sorted(method.batches(pool, pool.rows_of(*tasks)), key=pool.padded_tokens)
    chosen = [batches[-1], batches[len(batches) // 2]] if len(batches) > 1 else batches
    _keep(pool, chosen)
    evaluator, seconds = Evaluator(session.benchmark, session.data, session.split), 0.0
    tasks = sorted({int(task) for rows in chosen for task in pool.tasks[rows]})
    memory.reset()
    for measured in (True, False) if memory.takes_time else (True,):
        memory.start() if measured else memory.stop()
        start = time.perf_counter()
        evaluator(method, learned, tasks)
        seconds = time.perf_counter() - start
    sharing = min(evaluating_ranks(), len(chosen))
    return Evaluated(sum(map(pool.padded_tokens, chosen)) / sharing, seconds, memory.peak)


def evaluating_ranks() -> int:
    """Among how many ranks the batches of an evaluation are divided; a sharded backbone computes all on every rank."""
    return 1 if get_world().sharded else get_world().size


def _extrapolated(session: Session, work: Work, tasks: list[Rehearsed], evaluated: Evaluated) -> Estimate:
    """The needs of all tasks from those of the first ones, over all ranks."""
    trainer, world, total = cast(Rehearsal, session.trainer), get_world(), len(session.method.curriculum())
    later, newest = total - len(tasks), tasks[-1]
    before = tasks[-2] if len(tasks) > 1 else newest
    growth = max(0, newest.in_use - before.in_use) * later
    peak = max(task.peak for task in tasks)
    if later:
        heavier = max(work.heaviest, default=1) / max([1, *work.heaviest[: len(tasks)]])
        peak = max(peak, newest.at_step + growth + round(max(task.activations for task in tasks) * heavier))
    stored = newest.stored + (newest.stored - before.stored) * later + work.replay_state
    training, flops, other = _training(trainer, work, tasks)
    tokens = (work.evaluation + work.validation) / evaluating_ranks()
    evaluation = tokens * evaluated.seconds / max(1.0, evaluated.tokens)
    training, other, evaluation, *peaks = world.all_reduce_max(
        training, other, evaluation, peak / MB, (evaluated.peak + growth) / MB
    )
    seconds, hardware = training + other + evaluation, session.components.hardware.record()
    devices = world.size * (1 if "gpu" in hardware else int(hardware["threads"]))
    planned = work.planned
    return {
        "device": str(hardware.get("gpu", "cpu")),
        "devices": devices,
        "tasks": total,
        "rehearsed": len(tasks),
        "steps": work.steps,
        "training_seconds": training if planned else None,
        "other_seconds": other if planned else None,
        "evaluation_seconds": evaluation if planned else None,
        "seconds": seconds if planned else None,
        "device_hours": devices * seconds / 3600 if planned else None,
        "flops": sum(world.gather(flops)) if planned else None,
        "training_memory_mb": peaks[0],
        "evaluation_memory_mb": peaks[1],
        "peak_memory_mb": max(peaks),
        "stored_bytes": stored,
        "replay_bytes": BYTES_PER_TOKEN * work.replay_tokens,
    }


def _training(trainer: Rehearsal, work: Work, tasks: list[Rehearsed]) -> tuple[float, float, float]:
    """Seconds of steps, operations in all, and seconds of learning outside of steps, at the speed of steps."""
    overall, seconds, flops, outside = Sample(), 0.0, 0.0, 0.0
    for sample in trainer.samples.values():
        overall.add(sample)
    for number, (stages, examples) in enumerate(zip(work.stages, work.examples, strict=True)):
        for name, tokens in stages.items():
            sample = trainer.samples.get(name, overall)
            seconds += tokens * sample.seconds / max(1, sample.tokens)
            flops += tokens * sample.flops / max(1, sample.tokens)
        task = tasks[min(number, len(tasks) - 1)]
        outside += task.other_flops * examples / max(1, task.examples)
    speed = overall.flops / overall.seconds if overall.seconds else 0.0
    return seconds, flops + outside, outside / speed if speed else 0.0
