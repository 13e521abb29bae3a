"""dry_run=true: prints what a run would do, makes a few steps of its first tasks, and predicts what it will need."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from clpet.data.benchmark import Benchmark
from clpet.methods.base import Method
from clpet.models.adapters import Adapters, parameter_ratio
from clpet.models.protocols import config_of
from clpet.reporting import estimates
from clpet.reporting.tables import say
from clpet.runs.estimate import estimate
from clpet.runs.planning import planned_stages
from clpet.runtime.distributed import get_world
from clpet.wiring import Components, Session


def dry_run(console: Console, session: Session, out: Path) -> None:
    """Prints the tasks, one encoded example, the device and the steps per task; then the estimate, also into `out`."""
    config, method, objective = session.config, session.method, session.method.objective
    _print_tasks(console, session.benchmark)
    _print_example(console, method)
    say(console, f"device   {objective.device}, {str(objective.dtype).removeprefix('torch.')}")
    say(console, f"measured on {config.evaluation.split.value}")
    rates = [f"{name} {rate}" for name, rate in objective.adapters.dropout().items()]
    say(console, f"dropout  {', '.join(rates) or 'none'} (in the model's own layers, while training)")
    say(console, f"steps    {steps_per_task(method, config.train.epochs_of)}")
    estimated = estimate(session)
    say(console, _ratio(method.trainable_parameters(), objective.adapters.base_parameters))
    for line in estimates.lines(estimated):
        say(console, line)
    if get_world().is_main:
        estimates.write(out, estimated)


def _print_tasks(console: Console, benchmark: Benchmark) -> None:
    say(console, f"benchmark {benchmark.name}: {len(benchmark)} tasks, {len(benchmark.labels)} labels")
    for task in benchmark.tasks:
        sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test"
        say(console, f"  {task.name}: {sizes}" + (f"; labels {', '.join(task.labels)}" if task.labels else ""))


def _print_example(console: Console, method: Method) -> None:
    """The first training example of task 0, decoded from its tokens: what the model reads."""
    objective, pool = method.objective, method.data.train
    row = int(pool.rows_of(0)[0])
    say(console, f"example  {objective.tokenizer.decode(pool.tokens(row))}")
    say(console, f"tokens   {' '.join(map(str, pool.tokens(row)))}")
    say(console, objective.describe(pool, row))


def count_parameters(console: Console, components: Components, benchmark: Benchmark, reason: str) -> None:
    """Prints `reason`, why the weights cannot be loaded, and parameter counts from the model's config alone."""
    backbone, generates = components.backbone, components.objective.traits.needs_output_layer
    with torch.device("meta"):  # shapes without memory: a model of any size fits
        adapters = Adapters(backbone.skeleton(generates), backbone, components.peft, generates)
        adapters.add("default", 0)
    num_labels, base_parameters = len(benchmark.labels), adapters.base_parameters
    adapter_parameters = adapters.count("default")
    lines = [reason, f"adapter: {_ratio(adapter_parameters, base_parameters)}"]
    if not generates:
        head = (config_of(adapters.model).hidden_size + 1) * num_labels  # a linear layer with bias
        lines.append(f"adapter and a head of {num_labels} labels: {_ratio(adapter_parameters + head, base_parameters)}")
    for line in lines:
        say(console, line)


def _ratio(trainable: int, total: int) -> str:
    ratio = parameter_ratio(trainable, total)
    times = f", {ratio['times_fewer']:.1f} times fewer" if ratio["times_fewer"] else ""  # none: nothing is trained
    return f"trainable parameters {ratio['trainable']:,} of {ratio['total']:,}: {ratio['percent']:.3f} %{times}"


def steps_per_task(method: Method, epochs: Callable[[int], int]) -> str:
    """Optimizer steps of every task and stage."""
    counts = []
    for index, task, plans in planned_stages(method):
        stages = [f"{name} {plan.steps * epochs(index)}".strip() for name, plan in plans.items()]
        counts.append(f"{task.name} {' + '.join(stages)}")
    return "; ".join(counts)
