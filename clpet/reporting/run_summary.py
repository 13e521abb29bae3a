"""The lines that a run prints at its start and at its end."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from clpet.escape import inline, safe_name
from clpet.metrics.perplexity_transfer import DAPT
from clpet.metrics.transfer_matrix import TransferMatrix, on_split, round2
from clpet.records import DataRecord, HeadlineKey, Results, SplitSizes
from clpet.reporting.perplexity_tables import LEGEND, average_table
from clpet.reporting.recorded_objective import has_labels
from clpet.reporting.tables import matrix_table, say
from clpet.runtime.untrusted_json import command, split_of

SOFTMAX = {None: "", "task": "; softmax over each task's own labels", "seen": "; softmax over all labels seen"}
SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
SHORT_NAMES = {"backward_transfer": "bwt"}  # as `clpet show` prints them and `clpet runs --metrics` takes them
SUMMARY: tuple[HeadlineKey, ...] = ("average", "whole", "backward_transfer", "forgetting", "learning_accuracy")


def heading(
    method: str, benchmark: str, num_tasks: int, num_labels: int, softmax: str | None, resolved: Mapping[str, object]
) -> str:
    """The first line of a run: what is learned, and which automatic options were resolved to what."""
    labels = f", {num_labels} labels" if num_labels else ""
    choices = "".join(f"; {key}={value}" for key, value in resolved.items())
    return f"{method} on {benchmark}: {num_tasks} tasks{labels}{SOFTMAX[softmax]}{choices}"


def sizes(data: DataRecord) -> str:
    """The line of the header about the number of examples."""
    tasks = list(cast(Iterable[SplitSizes], data["tasks"].values()))
    train, validation, test = (sum(task[split] for task in tasks) for split in SPLITS)
    return f"data   {train:,} train, {validation:,} validation, {test:,} test examples"


def model_line(name: str, base: int, trained: int, host: Mapping[str, str | int]) -> str:
    """The line of the header about the model: parameters, trained ones, and device and precision of the computation."""
    share = f", {trained:,} trained ({100 * trained / base:.2f} %)" if trained else ""
    device = host.get("gpu") or f"{host['device']}, {host['threads']} thread{'s' * (host['threads'] != 1)}"
    ranks = f" on {host['ranks']} ranks" if int(host["ranks"]) > 1 else ""
    return f"model  {inline(name)}, {base:,} parameters{share}, {host['dtype']}, {device}{ranks}"


def work_line(steps: Sequence[int], batch_size: int) -> str:
    """The line of the header about the planned optimiser steps."""
    each = f"{min(steps):,}" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,}" if steps else ""
    planned = f"{sum(steps):,} steps of {batch_size} examples, {each} a task"
    return f"train  {planned if steps else 'the number of steps is not known ahead'}"


def show_finished(console: Console, out: Path, results: Results, address: str | None = None) -> None:
    """Prints the final table of a run, its directory, its `address` on wandb, and commands to try next."""
    matrix = TransferMatrix.from_json(results)
    lower = matrix.direction == "lower"
    benchmark = on_split(results["benchmark"], split_of(results))
    say(console, f"{results['method']} on {benchmark}, seed {results['seed']}: {_table_title(results, lower)}")
    say(console, matrix_table(matrix))
    say(console)
    if lower:
        say(console, average_table(results["pretraining"]))
        say(console, LEGEND)
    else:
        for name in SUMMARY:
            _say_value(console, SHORT_NAMES.get(name, name), results[name])
    if validation := results.get("validation"):
        _say_value(console, "validation_average", validation["average"])
    for key, value in results["diagnostics"][-1].items():
        if key != "row" and "/" not in key:  # names with a slash are of single tasks
            _say_value(console, key, value)
    ratio = results["parameters"]
    trained = f"{ratio['trainable']:,} of {ratio['total']:,} parameters ({ratio['percent']:.2f} %)"
    say(console, f"trained per task   {trained}")
    if source := results.get("extended_from"):
        say(console, f"extends            {source['run']}: {', '.join(map(safe_name, source['tasks']))}")
    say(console)
    say(console, f"run   {out}")
    if address:
        say(console, address)
    say(console, f"next  clpet show {out}")
    say(console, f"      {command(results, _next_method(results, lower))}")


def _table_title(results: Results, lower: bool) -> str:
    if lower:
        return f"{results.get('metric', 'perplexity')} after each domain (rows), lower is better"
    metric = "accuracy" if has_labels(results) else "score"
    return f"{metric} in % after each task (rows)"


def _say_value(console: Console, name: str, value: float | None) -> None:
    say(console, f"{name:18} {round2(value):>7}")


def _next_method(results: Results, lower: bool) -> str:
    """A method to compare with: a baseline, or after a baseline a continual-learning method for the objective."""
    if results["method"] not in ("sequential", "joint", "independent"):
        return "sequential"
    if lower:
        return DAPT  # gives the reference perplexities of each domain
    return "dynamic_conpet" if has_labels(results) else "o_lora"
