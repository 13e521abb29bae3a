"""What a benchmark's data is like: counts, balance, lengths, repeats, and text that occurs where it should not."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from clpet.tasks import SPLITS, Benchmark, Example, normalised
from clpet.text import Encoded


def key(example: Example) -> str:
    """What is compared: the normalised text with its template fields."""
    return normalised(" ".join([example.text, *example.fields.values()]))


def inspect_data(benchmark: Benchmark, data: Encoded | None = None) -> dict[str, Any]:
    """Counts per task and split, label balance, token lengths, repeats, overlaps and warnings; a plain dict."""
    keys = {
        (task.name, split): [key(example) for example in task.split(split)]
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
        "test in train": sum(text in pooled["train"] for name in benchmark.names for text in keys[name, "test"]),
        "test in validation": sum(
            text in pooled["validation"] for name in benchmark.names for text in keys[name, "test"]
        ),
        "validation in train": sum(text in pooled["train"] for n in benchmark.names for text in keys[n, "validation"]),
    }
    sets = {name: set(keys[name, "train"]) for name in benchmark.names}
    owners = Counter(text for texts in sets.values() for text in texts)
    found["train texts in several tasks"] = sum(count > 1 for count in owners.values())
    return {pair: count for pair, count in found.items() if count}


def _union(groups: Iterable[list[str]]) -> set[str]:
    return {text for group in groups for text in group}


def _warnings(benchmark: Benchmark, overlaps: dict[str, int]) -> list[str]:
    total = sum(len(task.test) for task in benchmark.tasks)
    return [
        f"{overlaps[pair]} of {total} test texts of {benchmark.name} also occur in {pair.split(' in ')[1]}"
        for pair in ("test in train", "test in validation")
        if pair in overlaps
    ]


def report(cfg: Any) -> str:
    """What `clpet data` prints: the tables of a benchmark composed in `cfg`, with the model's tokenizer."""
    from clpet.config import build, typed
    from clpet.console import table
    from clpet.objectives import load
    from clpet.text import encode_benchmark

    config = typed(cfg)
    source = build(config.benchmark, "benchmark")
    benchmark, backbone = source.load(config.data_dir), build(config.model, "model")
    encode = load(source.objective.value).encoder(benchmark, backbone, backbone.tokenizer())
    found = inspect_data(benchmark, encode_benchmark(benchmark, encode))
    header = ["task", *SPLITS, "labels", "label sizes", "tokens median", "p95", "max", "repeats"]
    rows = [
        [name, *(str(t[split]) for split in SPLITS), str(t["labels"]), f"{t['smallest_label']}-{t['largest_label']}",
         str(t["tokens"]["median"]), str(t["tokens"]["p95"]), str(t["tokens"]["max"]),
         "/".join(str(t["repeats"][split]) for split in SPLITS)]
        for name, t in found["tasks"].items()
    ]  # fmt: skip
    lines = [
        table(header, rows),
        "",
        "repeats: train/validation/test, texts equal to an earlier one (letters and digits only)",
    ]
    lines += [f"overlap: {pair}: {count}" for pair, count in found["overlaps"].items()] or ["overlap: none"]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join([*lines, f"fingerprint: {found['fingerprint']}"])
