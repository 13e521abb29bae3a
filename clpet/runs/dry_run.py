"""dry_run=true: what a run would be, one step of it, and no more."""

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from clpet.config.schema import Config
from clpet.data.benchmark import Benchmark
from clpet.methods.base import Method
from clpet.models.adapters import Adapters, parameter_ratio
from clpet.objectives import load
from clpet.objectives.cost_meter import peak_memory_mb
from clpet.replay.exemplar_selection import random_features
from clpet.reporting.tables import say
from clpet.training.trainer import Trainer


def dry_run(console: Console, config: Config, method: Method, benchmark: Benchmark, trainer: Trainer) -> None:
    """Prints one encoded example, the labels, parameters, steps per task and a memory estimate; does one step."""
    objective, pool = method.objective, method.data.train
    row = int(pool.rows_of(0)[0])
    example = objective.tokenizer.decode(pool.tokens(row))
    say(console, f"benchmark {benchmark.name}: {len(benchmark)} tasks, {len(benchmark.labels)} labels")
    for task in benchmark.tasks:
        sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test"
        say(console, f"  {task.name}: {sizes}" + (f"; labels {', '.join(task.labels)}" if task.labels else ""))
    say(console, f"example  {example}")
    say(console, f"tokens   {' '.join(map(str, pool.tokens(row)))}")
    say(console, objective.describe(pool, row))
    say(console, f"device   {objective.device}, {str(objective.dtype).removeprefix('torch.')}")
    say(console, f"measured on {config.evaluation.split.value}")
    rates = [f"{name} {rate}" for name, rate in objective.adapters.dropout().items()]
    say(console, f"dropout  {', '.join(rates) or 'none'} (of the model's own layers, in training)")
    say(console, f"steps    {steps_per_task(method, config.train.epochs_of)}")
    index, task = method.curriculum()[0]
    trainer.dry_run = True
    start = time.perf_counter()
    trainer.begin_task(index)
    method.learn(task, index, trainer)
    seconds = time.perf_counter() - start
    say(console, _ratio(method.trainable_parameters(), objective.adapters.base_parameters))
    did = f"one step of {config.train.global_batch_size} examples: {seconds:.2f} s"
    say(console, f"{did}, peak memory {peak_memory_mb():.0f} MB")


def count_parameters(console: Console, parts: dict[str, Any], benchmark: Benchmark, why: str) -> None:
    """Parameter counts from the model's config alone, for a machine that lacks the weights."""
    generates = load(parts["benchmark"].objective.value).generates
    with torch.device("meta"):
        adapters = Adapters(parts["model"].skeleton(generates), parts["model"], parts["peft"], generates)
        adapters.add("default", 0)
    network: Any = adapters.model.config
    labels, total = len(benchmark.labels), adapters.base_parameters
    adapter = adapters.count("default")
    lines = [why, f"adapter: {_ratio(adapter, total)}"]
    if not generates:
        head = (network.hidden_size + 1) * labels
        lines.append(f"adapter and a head of {labels} labels: {_ratio(adapter + head, total)}")
    for line in lines:
        say(console, line)


def _ratio(trainable: int, total: int) -> str:
    ratio = parameter_ratio(trainable, total)
    times = f"{ratio['times_fewer']:.1f} times fewer"
    return f"trainable parameters {ratio['trainable']:,} of {ratio['total']:,}: {ratio['percent']:.3f} %, {times}"


def steps_per_task(method: Method, epochs: Callable[[int], int]) -> str:
    """Optimiser steps of every task and stage, counted on a trial memory that is thrown away again."""
    counts = []
    for index, task in method.curriculum():
        stages = [f"{name} {plan.steps * epochs(index)}".strip() for name, plan in method.stages(index).items()]
        counts.append(f"{task.name} {' + '.join(stages)}")
        method.replay.update_memory(index, random_features)
    method.replay.setup(method.data, method.seed, method.replay.batch_size)
    return "; ".join(counts)
