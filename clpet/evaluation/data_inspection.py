"""What a benchmark's data is like: counts, balance, lengths, repeats, and text that occurs where it should not."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from clpet.config.build import build, parse_config
from clpet.data.batches import Encoded, encode_benchmark
from clpet.data.benchmark import SPLITS, Benchmark, Example, Task, normalize
from clpet.data.documents import Documents
from clpet.data.read_report import account
from clpet.objectives import load
from clpet.reporting.tables import table

OFTEN = 0.05  # share of texts or answers that are cut, from which on it is warned of


def key(example: Example) -> str:
    """What is compared: the normalised text with its template fields."""
    return normalize(" ".join([example.text, *example.fields.values()]))


def inspect_data(benchmark: Benchmark, data: Encoded | None = None) -> dict[str, Any]:
    """Counts per task and split, label balance, token lengths, repeats, overlaps and warnings; a plain dict."""
    if all(isinstance(task.train, Documents) for task in benchmark.tasks):
        return inspect_domains(benchmark, data)
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
            **_cut(data, index),
        }
    overlaps = _overlaps(benchmark, keys)
    return {
        "fingerprint": benchmark.fingerprint(),
        "read": benchmark.report.record(sum(len(task.split(split)) for task in benchmark.tasks for split in SPLITS)),
        "labels": benchmark.labels,
        "tasks": tasks,
        "overlaps": overlaps,
        "max_length": benchmark.max_length,
        "max_target": benchmark.max_target,
        "truncate": benchmark.truncate.value,
        "warnings": _warnings(benchmark, overlaps) + _much_cut(tasks, benchmark),
    }


def inspect_domains(benchmark: Benchmark, data: Encoded | None = None) -> dict[str, Any]:
    """Documents, pieces, bytes and tokens per domain and split, what was left out, the order; a plain dict."""
    tasks = {task.name: _domain(task, data, index) for index, task in enumerate(benchmark.tasks)}
    owners = Counter(key for task in benchmark.tasks for key in set(task.train.hashes.tolist()))  # type: ignore[attr-defined]
    dropped = {name: task["dropped"] for name, task in tasks.items() if task["dropped"]}
    found = {
        "test pieces in train": sum(dropped.values()),
        "train documents in several domains": sum(count > 1 for count in owners.values()),
    }
    warnings = benchmark.report.notes() + [
        f"domain {name}: {count} pieces of 200 characters of its test texts also occur in train and are left out"
        for name, count in dropped.items()
    ]
    if any(task["dropped"] is None for task in tasks.values()):
        warnings.append("test texts were not compared to train (benchmark.decontaminate=false)")
    return {
        "fingerprint": benchmark.fingerprint(),
        "read": benchmark.report.record(_documents(benchmark)),
        "labels": [],
        "tasks": tasks,
        "base": benchmark.base and {"name": benchmark.base.name, **_domain(benchmark.base)},
        "groups": benchmark.groups,
        "order": benchmark.order,
        "overlaps": {pair: count for pair, count in found.items() if count},
        "warnings": warnings,
    }


def _documents(benchmark: Benchmark) -> int:
    tasks = [*benchmark.tasks, *([benchmark.base] if benchmark.base else [])]
    parts: list[Any] = [task.split(split) for task in tasks for split in SPLITS]
    return sum(part.num_documents for part in parts)


def _domain(task: Task, data: Encoded | None = None, index: int = -1) -> dict[str, Any]:
    parts: dict[str, Any] = {split: task.split(split) for split in SPLITS}
    pools = {split: getattr(data, split) for split in SPLITS} if data else {}
    return {
        **{split: len(part) for split, part in parts.items()},
        "pieces": {split: part.num_pieces for split, part in parts.items()},
        "bytes": {split: part.bytes for split, part in parts.items()},
        "repeats": {split: part.repeats for split, part in parts.items()},
        "tokens": {split: int(pool.lengths[pool.rows_of(index)].sum()) for split, pool in pools.items()},
        "borders": parts["train"].has_boundaries,
        "dropped": parts["test"].num_contaminated,
    }


def repeats(texts: list[str]) -> int:
    """How many texts repeat an earlier one."""
    return len(texts) - len(set(texts))


def _cut(data: Encoded | None, index: int) -> dict[str, dict[str, int]]:
    """How many texts and answers of a task were cut, by split."""
    pools = {split: getattr(data, split) for split in SPLITS} if data else {}
    counts = {split: pool.num_truncated(pool.rows_of(index)) for split, pool in pools.items()}
    return {
        "texts_cut": {split: texts for split, (texts, _) in counts.items()},
        "answers_cut": {split: answers for split, (_, answers) in counts.items()},
    }


def cut_counts(tasks: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """{texts, answers: (how many were cut, of how many)} over all tasks and splits."""
    total = sum(task[split] for task in tasks.values() for split in SPLITS)
    return {what: (sum(sum(t[f"{what}_cut"].values()) for t in tasks.values()), total) for what in ("texts", "answers")}


def cut_line(found: dict[str, Any]) -> str:
    """What a run says of the texts and answers that were cut, '' where none was."""
    if "truncate" not in found:
        return ""
    most = {"texts": f"{found['max_length']} tokens ({found['truncate']})", "answers": f"{found['max_target']} tokens"}
    counts = cut_counts(found["tasks"])
    said = [f"{count} of {total} {what} at {most[what]}" for what, (count, total) in counts.items() if count]
    return f"cut: {', '.join(said)}" if said else ""


def _much_cut(tasks: dict[str, dict[str, Any]], benchmark: Benchmark) -> list[str]:
    """Warnings where more than a twentieth of all texts, or of all answers, were cut."""
    limits = {
        "texts": f"benchmark.max_length={benchmark.max_length} tokens, prompt included: raise it, or choose what is "
        f"cut by benchmark.truncate={benchmark.truncate.value} and benchmark.keep",
        "answers": f"benchmark.max_target={benchmark.max_target} tokens, end included: raise it",
    }
    return [
        f"{count} of {total} {what} ({100 * count / total:.0f} %) are cut, since they are longer than {limits[what]}"
        for what, (count, total) in cut_counts(tasks).items()
        if count > OFTEN * total
    ]


def _lengths(data: Encoded | None, index: int) -> dict[str, int]:
    """Tokens of train texts with their answers, before they were cut."""
    if data is None:
        return {}
    rows = data.train.rows_of(index)
    lengths = data.train.full_lengths[rows] + data.train.full_answer_lengths[rows]
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


def near_equal(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ in case, spaces and Unicode form only."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault("".join(unicodedata.normalize("NFKC", label).casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _near_equal(benchmark: Benchmark) -> list[str]:
    """What to say of labels that may be one by mistake: of a task where answers are written, or of all tasks."""
    spaces = {"": benchmark.labels}
    if benchmark.max_target:
        spaces = {f"task {task.name}: ": list(task.labels) for task in benchmark.tasks}
    return [
        f"{where}the labels {', '.join(map(repr, group))} differ only in case, spaces or Unicode form: are they one?"
        for where, labels in spaces.items()
        for group in near_equal(labels)
    ]


def _warnings(benchmark: Benchmark, overlaps: dict[str, int]) -> list[str]:
    total = sum(len(task.test) for task in benchmark.tasks)
    return [*benchmark.report.notes(), *_near_equal(benchmark)] + [
        f"{overlaps[pair]} of {total} test texts of {benchmark.name} also occur in {pair.split(' in ')[1]}"
        for pair in ("test in train", "test in validation")
        if pair in overlaps
    ]


def report(cfg: Any) -> str:
    """What `clpet data` prints: the tables of a benchmark composed in `cfg`, with the model's tokenizer."""
    config = parse_config(cfg)
    source = build(config.benchmark, "benchmark")
    if source.plain_text:
        return _domain_report(inspect_domains(source.load(config.data_dir)))
    benchmark, backbone = source.load(config.data_dir), build(config.model, "model")
    objective = load(source.objective.value)
    objective.check_benchmark(benchmark, config.evaluation)
    encode = objective.encoder(benchmark, backbone, backbone.tokenizer())
    found = inspect_data(benchmark, encode_benchmark(benchmark, encode))
    answers = ["answers cut"] if benchmark.max_target else []
    header = ["task", *SPLITS, "labels", "label sizes", "tokens median", "p95", "max", "cut", *answers, "repeats"]
    rows = [
        [name, *(str(t[split]) for split in SPLITS), str(t["labels"]), f"{t['smallest_label']}-{t['largest_label']}",
         str(t["tokens"]["median"]), str(t["tokens"]["p95"]), str(t["tokens"]["max"]),
         *("/".join(str(t[count][split]) for split in SPLITS)
           for count in ("texts_cut", *(["answers_cut"] if answers else []), "repeats"))]
        for name, t in found["tasks"].items()
    ]  # fmt: skip
    note = (
        "tokens: of train texts with their answers, before they are cut; cut, repeats: train/validation/test\n"
        f"cut: texts of more than benchmark.max_length={benchmark.max_length} tokens"
        + (f", answers of more than benchmark.max_target={benchmark.max_target}" if answers else "")
        + "\nrepeats: texts equal to an earlier one (letters and digits only)"
    )
    return _printed(table(header, rows), note, found)


def _domain_report(found: dict[str, Any]) -> str:

    header = ["domain", "documents", "pieces", "MB", "repeats", "left out"]
    domains = dict(found["tasks"])
    if found["base"]:
        domains[f"{found['base']['name']} (base)"] = found["base"]
    rows = [
        [name, *("/".join(str(values[split]) for split in SPLITS) for values in (d, d["pieces"])),
         "/".join(f"{d['bytes'][split] / 1e6:.2f}" for split in SPLITS),
         "/".join(str(d["repeats"][split]) for split in SPLITS), str(d["dropped"] or 0)]
        for name, d in domains.items()
    ]  # fmt: skip
    note = "train/validation/test; repeats: documents equal to an earlier one; left out: test pieces found in train"
    groups = "".join(f"\ngroup {name}: {', '.join(members)}" for name, members in found["groups"].items())
    order = f"\norder: {found['order']['order']}, {found['order']['hash']}"
    return _printed(table(header, rows), note + groups + order, found)


def _printed(table: str, note: str, found: dict[str, Any]) -> str:
    lines = [table, "", note, *([account(found["read"])] if found["read"]["read"] else [])]
    lines += [f"overlap: {pair}: {count}" for pair, count in found["overlaps"].items()] or ["overlap: none"]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join([*lines, f"fingerprint: {found['fingerprint']}"])
