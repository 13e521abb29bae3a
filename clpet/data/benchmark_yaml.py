"""A commented benchmark YAML from a proposal of `clpet data`, for `clpet init`."""

import json
from collections.abc import Mapping
from pathlib import Path

from clpet.data.proposal import Proposal, without_reference
from clpet.escape import inline

PREFIX = "benchmark."
COMMENTS = {
    "text": "text column, or a text with {column} slots",
    "label": "column with the label or the answer",
    "task": "column that names the task",
    "messages": "column with the messages",
    "classes_per_task": "labels per task, in alphabetical order; task_labels: {name: [labels]} names the groups",
    "encoding": "encoding of the files",
    "header": "names of the columns, since the files have no header row",
    "skip_bad": "true: drop and count rows that cannot be used",
    "drop_labels": "labels that train lacks",
    "max_length": "maximum tokens of a text",
    "metric": "score of an answer",
    "domains": "folders or files that are read",
    "test_share": "fraction of train that is held out as test",
    "splits": "file name of each split",
}
FURTHER = {  # options to think of, commented out
    "files": ("max_train: 100  # maximum training examples per task", "order: random  # training order of the tasks"),
    "folders": ("label_space: union  # labels of the same name in two tasks are one label", "order: random"),
    "text_domains": ("max_length: 512  # tokens per window", "order: similar  # training order of the domains"),
    "chat": ("max_length: 512  # maximum tokens before the answer", "order: random  # training order of the tasks"),
}


def benchmark_yaml(proposal: Proposal, given: Mapping[str, str], name: str) -> tuple[str, list[str]]:
    """(text of the YAML, the words that a command needs in addition to benchmark=NAME)."""
    values = {key: value for key, value in proposal.options.items() if key not in given}
    kind, path = str(values.pop("benchmark")), Path(str(values.pop("data_dir")))
    objective = given.get("objective", values.pop("objective", None))
    inner = {
        key.removeprefix("benchmark."): _yaml(value) for key, value in values.items() if key.startswith("benchmark.")
    }
    inner |= {key.removeprefix("benchmark."): value for key, value in given.items() if key.startswith("benchmark.")}
    lines = ["# @package _global_", *(f"# {inline(reason)}" for reason in _reasons(proposal))]
    lines += ["defaults:", f"  - {kind}@benchmark"]
    lines += [f"  - override /objective: {objective}"] if objective else []
    lines += ["  - _self_", f"data_dir: {_yaml(str(path.absolute()))}  # where the data are", "benchmark:"]
    lines += [f"  name: {name}  # name in the run directory's path", *_options(inner)]
    lines += [f"  # {line}" for line in FURTHER[kind]]
    others = {key: str(value) for key, value in values.items()} | dict(given)
    words = [f"{key}={value}" for key, value in others.items() if not key.startswith(PREFIX) and key != "objective"]
    return "\n".join(lines) + "\n", words


def _reasons(proposal: Proposal) -> list[str]:
    return [f"Read as {proposal.reading.describe()}", *proposal.reasons]


def _options(inner: Mapping[str, str]) -> list[str]:
    """Lines `key: value  # comment`; keys such as splits.test are nested."""
    lines: list[str] = []
    groups: dict[str, list[str]] = {}
    for key, value in inner.items():
        group, dot, item = key.partition(".")
        if dot:
            groups.setdefault(group, []).append(f"    {item}: {value}")
        else:
            lines.append(f"  {key}: {value}" + (f"  # {COMMENTS[key]}" if key in COMMENTS else ""))
    for group, items in groups.items():
        lines += [f"  {group}:" + (f"  # {COMMENTS[group]}" if group in COMMENTS else ""), *items]
    return lines


def _yaml(value: object) -> str:
    """A value in YAML: JSON is a part of it. Raises DataError for a reference."""
    without_reference(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | list) else str(value)
