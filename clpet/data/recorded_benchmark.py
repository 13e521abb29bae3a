"""A benchmark without its data: the tasks and labels that a run has recorded, each with one made-up example.

A model that only answers new texts needs of its training data no more than these names and the templates.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.sources.base import Source
from clpet.records import LabelledDataRecord, TaskRecord


def recorded_benchmark(source: Source, names: Sequence[str], data: LabelledDataRecord) -> Benchmark | None:
    """The benchmark that `source` makes of tasks called `names`; None if their labels are not in the record.

    Its examples have the text "-", so that every split of every task has rows.
    """
    labels = recorded_labels(names, data)
    if source.plain_text or labels is None:
        return None
    fields = dict.fromkeys(source.slots, "-") | dict.fromkeys(source.extra_columns, "other")
    tasks = []
    for name, of_task in labels.items():
        examples = [Example("-", label, fields) for label in of_task or ["-"]]
        metric = source.metrics.get(name, source.metric) if source.traits.generates_text else "accuracy"
        tasks.append(Task(name, examples, examples, examples, tuple(of_task), metric))
    benchmark = source.benchmark_of(tasks)
    return benchmark if benchmark.labels == data["labels"] else None


def recorded_labels(names: Sequence[str], data: LabelledDataRecord) -> dict[str, list[str]] | None:
    """{task: its labels}. Runs of older versions recorded their numbers: enough unless tasks share labels."""
    records, labels = cast(Mapping[str, TaskRecord], data["tasks"]), data["labels"]
    if all("label_names" in records[name] for name in names):
        return {name: records[name]["label_names"] for name in names}
    if sum(records[name]["labels"] for name in names) != len(labels):
        return None
    rest = iter(labels)
    return {name: [next(rest) for _ in range(records[name]["labels"])] for name in names}
