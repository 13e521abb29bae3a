"""dry_run=true: prints what a run would do, makes a few steps of its first tasks, and predicts what it will need."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from clpet.data.benchmark import Benchmark
from clpet.methods.base import Method
from clpet.models.adapters import Adapters, parameter_ratio
from clpet.models.protocols import config_of, network_of
from clpet.reporting import estimates
from clpet.reporting.estimates import MB
from clpet.reporting.tables import say
from clpet.runs.estimate import estimate
from clpet.runs.planning import planned_stages
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.runtime.tensor_memory import TensorsAlive
from clpet.training.optimizers import OPTIMIZERS, size
from clpet.wiring import Components, Session

# Options of `hardware` that change the memory which shapes predict.
NOT_CONSIDERED = ("shard", "offload", "gradient_checkpointing", "quantization", "compile", "kernels")


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
    absent = [f"evaluation.{option}" for option in ("probes", "downstream") if getattr(config.evaluation, option)]
    if absent:
        say(console, f"without  {', '.join(absent)}: their time and memory are not estimated")
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


@dataclass(frozen=True)
class Shapes:
    """What shapes alone tell of a training step with texts of the largest length, in parameters and bytes."""

    adapters: Adapters  # on the meta device
    trained: int  # parameters of one adapter, without a head; 0 where the method alone trains something
    rows: int  # texts in a forward pass of a rank
    length: int  # tokens of a text, its answer included
    weights: int
    moments: int  # of the optimiser
    added: int | None  # by gradients and activations; None where the model cannot run without values

    @classmethod
    def of(cls, components: Components, max_length: int, max_target: int) -> "Shapes":
        """The shapes of a configuration, with texts of `max_length` and answers of `max_target` tokens.

        Raises ModelError for a model without a config in its YAML.
        """
        backbone, generates = components.backbone, components.objective.traits.needs_output_layer
        train, hardware, trains = components.config.train, components.hardware, components.peft.traits.trains
        dtype = torch.float32 if components.peft.traits.full else hardware.torch_dtype
        with torch.device("meta"):  # shapes without memory: a model of any size fits
            adapters = Adapters(backbone.skeleton(generates).to(dtype), backbone, components.peft, generates)
            if trains:
                adapters.add("default", 0)
        answer = max_target if components.objective.traits.in_words else 0
        weights = size(dict(adapters.model.named_parameters()))
        trained = adapters.tensors("default") if trains else {}
        moments = OPTIMIZERS[train.optimizer].moment_bytes(trained, train)
        rows = rows_of_step(train.global_batch_size, max_length + answer, hardware)
        added = step_memory(adapters.model, generates, rows, max_length, answer) if trains else None
        count = sum(tensor.numel() for tensor in trained.values())
        return cls(adapters, count, rows, max_length + answer, weights, moments, added)

    @property
    def memory(self) -> int | None:
        """The memory of a rank's training step in bytes, if it is known."""
        return None if self.added is None else self.weights + self.moments + self.added

    def line(self, components: Components) -> str:
        """The memory of a rank's training step, in words."""
        hardware, optimizer = components.hardware, components.config.train.optimizer
        fixed = f"weights {self.weights / MB:,.0f} MB, optimiser {self.moments / MB:,.0f} MB ({optimizer})"
        ignored = [option for option in NOT_CONSIDERED if getattr(hardware, option) != getattr(Hardware, option)]
        note = f"; not considered: {', '.join(f'hardware.{option}' for option in ignored)}" if ignored else ""
        if self.added is None or self.memory is None:
            return f"memory   {fixed}; gradients and activations are not known{note}"
        return (
            f"memory   about {self.memory / MB:,.0f} MB for {self.rows} texts of {self.length} tokens: {fixed}, "
            f"gradients and activations {self.added / MB:,.0f} MB{note}"
        )


def count_parameters(console: Console, components: Components, benchmark: Benchmark, reason: str) -> None:
    """Prints `reason`, why the weights cannot be loaded, and parameter counts from the model's config alone."""
    shapes = Shapes.of(components, benchmark.max_length, benchmark.max_target)
    num_labels, total = len(benchmark.labels), shapes.adapters.base_parameters
    lines = [reason, f"adapter: {_ratio(shapes.trained, total)}" if shapes.trained else f"parameters {total:,}"]
    if shapes.trained and not components.objective.traits.needs_output_layer:
        head = (config_of(shapes.adapters.model).hidden_size + 1) * num_labels  # a linear layer with bias
        lines.append(f"adapter and a head of {num_labels} labels: {_ratio(shapes.trained + head, total)}")
    lines.append(shapes.line(components))
    for line in lines:
        say(console, line)


def rows_of_step(batch_size: int, length: int, hardware: Hardware) -> int:
    """How many texts of `length` tokens a rank computes at once."""
    rows = -(-batch_size // get_world().size)
    rows = min(rows, hardware.micro_batch_size or rows)
    return min(rows, max(1, hardware.max_tokens // length)) if hardware.max_tokens else rows


def step_memory(model: nn.Module, generates: bool, rows: int, length: int, answer: int = 0) -> int | None:
    """Bytes that a forward and a backward pass add to a network on the meta device; None if it cannot run there."""
    seq2seq = generates and config_of(model).is_encoder_decoder
    ids = torch.zeros(rows, length + (0 if seq2seq else answer), dtype=torch.long, device="meta")
    inputs: dict[str, object] = {"input_ids": ids}
    if generates:
        inputs["use_cache"] = False
    if seq2seq:
        inputs["decoder_input_ids"] = torch.zeros(rows, max(1, answer), dtype=torch.long, device="meta")
    elif answer:
        inputs["logits_to_keep"] = answer
    with TensorsAlive() as alive:
        alive.add(list(model.parameters()))
        before = alive.bytes
        try:
            output = network_of(model)(**inputs)
            values = output.logits if generates else output.last_hidden_state
            values.float().log_softmax(-1).mean().backward()
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # it reads values, which do not exist there
            return None
        return int(alive.peak - before)


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
