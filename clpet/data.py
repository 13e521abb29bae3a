"""What a benchmark's data is like: counts, balance, lengths, repeats, and text that occurs where it should not."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from clpet.tasks import SPLITS, Benchmark, Example
from clpet.text import Encoded

_NOT_WORD = re.compile(r"[\W_]+")


def normalised(example: Example) -> str:
    """Lower-case letters and digits only: texts that differ in case and punctuation are the same."""
    return _NOT_WORD.sub(" ", " ".join([example.text, *example.fields.values()]).lower()).strip()


def inspect_data(benchmark: Benchmark, data: Encoded | None = None) -> dict[str, Any]:
    """Counts per task and split, label balance, token lengths, repeats, overlaps and warnings; a plain dict."""
    keys = {
        (task.name, split): [normalised(example) for example in task.split(split)]
        for task in benchmark.tasks
        for split in SPLITS
    }
    tasks = {}
    for index, task in enumerate(benchmark.tasks):
        counts = Counter(example.target for example in task.train)
        tasks[task.name] = {
            **{split: len(task.split(split)) for split in SPLITS},
            "labels": len(task.labels),
            "smallest_label": min(counts.values()),
            "largest_label": max(counts.values()),
            "repeats": {split: repeats(keys[task.name, split]) for split in SPLITS},
            "tokens": _lengths(data, index),
        }
    overlaps = _overlaps(benchmark, keys)
    return {
        "fingerprint": benchmark.fingerprint(),
        "labels": benchmark.labels,
        "tasks": tasks,
        "overlaps": overlaps,
        "warnings": _warnings(benchmark, overlaps),
    }


def repeats(texts: list[str]) -> int:
    """How many texts repeat an earlier one."""
    return len(texts) - len(set(texts))


def _lengths(data: Encoded | None, index: int) -> dict[str, int]:
    if data is None:
        return {}
    lengths = data.train.lengths[data.train.rows_of(index)]
    return {"median": int(np.median(lengths)), "p95": int(np.percentile(lengths, 95)), "max": int(lengths.max())}


def _overlaps(benchmark: Benchmark, keys: dict[tuple[str, str], list[str]]) -> dict[str, int]:
    """Number of texts that two splits, or two tasks' train parts, share (only pairs that share any)."""
    pooled = {split: _union(keys[name, split] for name in benchmark.names) for split in SPLITS}
    found = {
        "test in train": sum(key in pooled["train"] for name in benchmark.names for key in keys[name, "test"]),
        "test in validation": sum(
            key in pooled["validation"] for name in benchmark.names for key in keys[name, "test"]
        ),
        "validation in train": sum(key in pooled["train"] for n in benchmark.names for key in keys[n, "validation"]),
    }
    sets = {name: set(keys[name, "train"]) for name in benchmark.names}
    owners = Counter(key for texts in sets.values() for key in texts)
    found["train texts in several tasks"] = sum(count > 1 for count in owners.values())
    return {pair: count for pair, count in found.items() if count}


def _union(groups: Iterable[list[str]]) -> set[str]:
    return {key for group in groups for key in group}


def _warnings(benchmark: Benchmark, overlaps: dict[str, int]) -> list[str]:
    total = sum(len(task.test) for task in benchmark.tasks)
    return [
        f"{overlaps[pair]} of {total} test texts of {benchmark.name} also occur in {pair.split(' in ')[1]}"
        for pair in ("test in train", "test in validation")
        if pair in overlaps
    ]
