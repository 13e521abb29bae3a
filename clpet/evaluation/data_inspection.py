"""Statistics of a benchmark's data: counts, label balance, lengths, repeats, overlaps between splits, warnings."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

import numpy as np
from omegaconf import DictConfig

from clpet.config.build import build, parse_config
from clpet.data.batches import Encoded, encode_benchmark
from clpet.data.benchmark import SPLITS, Benchmark, Example, Split, Task, normalize
from clpet.data.documents import Documents
from clpet.data.read_report import account
from clpet.objectives import load
from clpet.records import DataRecord, DomainRecord, LabelledDataRecord, TaskRecord, TextDataRecord
from clpet.reporting.tables import table

OFTEN = 0.05  # share of truncated texts or answers above which there is a warning


class _Cut(TypedDict):
    texts_cut: dict[str, int]
    answers_cut: dict[str, int]


def key(example: Example) -> str:
    """The normalized text with its template fields: examples with equal keys count as equal."""
    return normalize(" ".join([example.text, *example.fields.values()]))


def inspect_data(benchmark: Benchmark, data: Encoded | None = None) -> DataRecord:
    """Counts per task and split, label balance, token lengths, repeats, overlaps and warnings, as plain values."""
    if all(isinstance(task.train, Documents) for task in benchmark.tasks):
        return inspect_domains(benchmark, data)
    return _inspect_tasks(benchmark, data)


def _inspect_tasks(benchmark: Benchmark, data: Encoded | None) -> LabelledDataRecord:
    keys = {
        (task.name, split): [key(example) for example in task.split(split)]
        for task in benchmark.tasks
        for split in SPLITS
    }
    tasks: dict[str, TaskRecord] = {}
    for index, task in enumerate(benchmark.tasks):
        counts = Counter(example.target for example in task.train)
        tasks[task.name] = {
            "data_fingerprint": benchmark.task_fingerprint(task),
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
            "labels": len(task.labels),
            "label_names": list(task.labels),
            "smallest_label": min(counts.values()),
            "largest_label": max(counts.values()),
            "repeats": {split: repeats(keys[task.name, split]) for split in SPLITS},
            "tokens": _lengths(data, index),
            **_cut(data, index),
        }
    overlaps = _overlaps(benchmark, keys)
    record: LabelledDataRecord = {
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
    if benchmark.chat:
        record["chat"] = benchmark.chat.value
    return record


def inspect_domains(benchmark: Benchmark, data: Encoded | None = None) -> TextDataRecord:
    """The same for plain text: documents, pieces, bytes and tokens per domain and split, decontamination, the order."""
    tasks = {task.name: _domain(task, data, index) for index, task in enumerate(benchmark.tasks)}
    num_domains = Counter(key for task in benchmark.tasks for key in set(task.train.hashes.tolist()))  # type: ignore[attr-defined]
    contaminated = {name: task["dropped"] for name, task in tasks.items() if task["dropped"]}
    overlaps = {
        "test pieces in train": sum(contaminated.values()),
        "train documents in several domains": sum(count > 1 for count in num_domains.values()),
    }
    warnings = benchmark.report.notes() + [
        f"domain {name}: {count} pieces of 200 characters of its test texts also occur in train and are left out"
        for name, count in contaminated.items()
    ]
    if any(task["dropped"] is None for task in tasks.values()):
        warnings.append("test texts were not compared to train (benchmark.decontaminate=false)")
    return {
        "fingerprint": benchmark.fingerprint(),
        "read": benchmark.report.record(_documents(benchmark)),
        "labels": [],
        "tasks": tasks,
        "base": None if benchmark.base is None else {"name": benchmark.base.name, **_domain(benchmark.base)},
        "groups": benchmark.groups,
        "order": benchmark.order,
        "overlaps": {pair: count for pair, count in overlaps.items() if count},
        "warnings": warnings,
    }


def _documents(benchmark: Benchmark) -> int:
    tasks = [*benchmark.tasks, *([benchmark.base] if benchmark.base else [])]
    return sum(_documents_of(task, split).num_documents for task in tasks for split in SPLITS)


def _documents_of(task: Task, split: Split) -> Documents:
    return cast(Documents, task.split(split))


def _domain(task: Task, data: Encoded | None = None, index: int = -1) -> DomainRecord:
    splits = {split: _documents_of(task, split) for split in SPLITS}
    pools = {split: getattr(data, split) for split in SPLITS} if data else {}
    return {
        "data_fingerprint": Benchmark.task_fingerprint(task),
        "train": len(splits["train"]),
        "validation": len(splits["validation"]),
        "test": len(splits["test"]),
        "pieces": {split: texts.num_pieces for split, texts in splits.items()},
        "bytes": {split: texts.bytes for split, texts in splits.items()},
        "repeats": {split: texts.repeats for split, texts in splits.items()},
        "tokens": {split: int(pool.lengths[pool.rows_of(index)].sum()) for split, pool in pools.items()},
        "borders": splits["train"].has_boundaries,
        "dropped": splits["test"].num_contaminated,
    }


def repeats(texts: list[str]) -> int:
    """Number of texts that are equal to an earlier one."""
    return len(texts) - len(set(texts))


def _cut(data: Encoded | None, index: int) -> _Cut:
    """Numbers of truncated texts and answers of a task, by split."""
    pools = {split: getattr(data, split) for split in SPLITS} if data else {}
    counts = {split: pool.num_truncated(pool.rows_of(index)) for split, pool in pools.items()}
    return {
        "texts_cut": {split: texts for split, (texts, _) in counts.items()},
        "answers_cut": {split: answers for split, (_, answers) in counts.items()},
    }


def cut_counts(tasks: Mapping[str, TaskRecord]) -> dict[str, tuple[int, int]]:
    """{texts, answers: (number truncated, total number)} over all tasks and splits."""
    total = sum(task[split] for task in tasks.values() for split in SPLITS)
    texts = sum(sum(task["texts_cut"].values()) for task in tasks.values())
    answers = sum(sum(task["answers_cut"].values()) for task in tasks.values())
    return {"texts": (texts, total), "answers": (answers, total)}


def cut_line(record: DataRecord) -> str:
    """A line with the numbers of truncated texts and answers, '' if there are none."""
    if "truncate" not in record:  # plain text is not truncated
        return ""
    record = cast(LabelledDataRecord, record)
    side = f"oldest turns first, then {record['truncate']}" if record.get("chat") else record["truncate"]
    limits = {
        "texts": f"{record['max_length']} tokens ({side})",
        "answers": f"{record['max_target']} tokens",
    }
    counts = cut_counts(record["tasks"])
    items = [f"{count} of {total} {what} at {limits[what]}" for what, (count, total) in counts.items() if count]
    return f"cut: {', '.join(items)}" if items else ""


def _much_cut(tasks: Mapping[str, TaskRecord], benchmark: Benchmark) -> list[str]:
    """Warnings if more than OFTEN of all texts, or of all answers, are truncated."""
    limits = {
        "texts": f"benchmark.max_length={benchmark.max_length} tokens, prompt included: raise benchmark.max_length, "
        f"or set what is cut by benchmark.truncate={benchmark.truncate.value} and benchmark.cut_last",
        "answers": f"benchmark.max_target={benchmark.max_target} tokens, end token included: raise it",
    }
    return [
        f"{count} of {total} {what} ({100 * count / total:.0f} %) are cut because they are longer than {limits[what]}"
        for what, (count, total) in cut_counts(tasks).items()
        if count > OFTEN * total
    ]


def _lengths(data: Encoded | None, index: int) -> dict[str, int]:
    """Numbers of tokens of the train texts with their answers, before truncation."""
    if data is None:
        return {}
    rows = data.train.rows_of(index)
    lengths = data.train.full_lengths[rows] + data.train.full_answer_lengths[rows]
    return {"median": int(np.median(lengths)), "p95": int(np.percentile(lengths, 95)), "max": int(lengths.max())}


def _overlaps(benchmark: Benchmark, keys: Mapping[tuple[str, Split], list[str]]) -> dict[str, int]:
    """Numbers of texts that two splits, or the train splits of several tasks, have in common; zeros are left out."""
    pooled = {split: _union(keys[name, split] for name in benchmark.names) for split in SPLITS}
    overlaps = {
        "test in train": sum(text in pooled["train"] for name in benchmark.names for text in keys[name, "test"]),
        "test in validation": sum(
            text in pooled["validation"] for name in benchmark.names for text in keys[name, "test"]
        ),
        "validation in train": sum(text in pooled["train"] for n in benchmark.names for text in keys[n, "validation"]),
    }
    sets = {name: set(keys[name, "train"]) for name in benchmark.names}
    num_tasks = Counter(text for texts in sets.values() for text in texts)
    overlaps["train texts in several tasks"] = sum(count > 1 for count in num_tasks.values())
    return {pair: count for pair, count in overlaps.items() if count}


def _union(groups: Iterable[list[str]]) -> set[str]:
    return {text for group in groups for text in group}


def near_equal(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, spaces and Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault("".join(unicodedata.normalize("NFKC", label).casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _label_warnings(benchmark: Benchmark) -> list[str]:
    """Warnings about labels that may be meant as one: among all labels or, for generated answers, those of a task."""
    label_sets = {"": benchmark.labels}
    if benchmark.max_target:
        label_sets = {f"task {task.name}: ": list(task.labels) for task in benchmark.tasks}
    return [
        f"{prefix}the labels {', '.join(map(repr, group))} differ only in case, spaces or Unicode form: are they one?"
        for prefix, labels in label_sets.items()
        for group in near_equal(labels)
    ]


def _warnings(benchmark: Benchmark, overlaps: dict[str, int]) -> list[str]:
    total = sum(len(task.test) for task in benchmark.tasks)
    return [*benchmark.report.notes(), *_label_warnings(benchmark)] + [
        f"{overlaps[pair]} of {total} test texts of {benchmark.name} also occur in {pair.split(' in ')[1]}"
        for pair in ("test in train", "test in validation")
        if pair in overlaps
    ]


def report(cfg: DictConfig) -> str:
    """The report of `clpet data` on the benchmark of a composed configuration, with the tokenizer of its model."""
    text, record = inspect_config(cfg)
    return "\n".join(
        [
            text,
            *([f"overlap: {pair}: {count}" for pair, count in record["overlaps"].items()] or ["overlap: none"]),
            *(f"warning: {warning}" for warning in record["warnings"]),
            f"fingerprint: {record['fingerprint']}",
        ]
    )


def inspect_config(cfg: DictConfig, tokenize: bool = True, local: bool = False) -> tuple[str, DataRecord]:
    """The statistics of a configuration's benchmark, as a table and as a record.

    Without `tokenize` the model's tokenizer is not needed, and lengths are left out; with `local` it is not downloaded.
    """
    config = parse_config(cfg)
    objective, source = load(config, None)
    if source.plain_text:
        domains = inspect_domains(source.load(config.data_dir))
        return _domain_table(domains), domains
    benchmark, backbone = source.load(config.data_dir), build(config.model, "model")
    source.check_backbone(backbone)
    objective.check_benchmark(benchmark, config.evaluation)
    encoded = None
    if tokenize:
        encoded = encode_benchmark(benchmark, objective.encoder(benchmark, backbone, backbone.tokenizer(local)))
    record = _inspect_tasks(benchmark, encoded)
    return _task_table(benchmark, record), record


def _task_table(benchmark: Benchmark, record: LabelledDataRecord) -> str:
    answers = ["answers cut"] if benchmark.max_target else []
    has_labels = any(t["labels"] for t in record["tasks"].values())
    header = [
        "task",
        *SPLITS,
        *(["labels", "label sizes"] if has_labels else []),
        "tokens median",
        "p95",
        "max",
        "cut",
        *answers,
        "repeats",
    ]
    rows = [
        [name, *(str(t[split]) for split in SPLITS),
         *([str(t["labels"]), f"{t['smallest_label']}-{t['largest_label']}"] if has_labels else []),
         *(str(t["tokens"].get(name, "-")) for name in ("median", "p95", "max")),
         *("/".join(str(counts.get(split, "-")) for split in SPLITS)
           for counts in (t["texts_cut"], *([t["answers_cut"]] if answers else []), t["repeats"]))]
        for name, t in record["tasks"].items()
    ]  # fmt: skip
    note = (
        "tokens: of train texts with their answers, before truncation; cut, repeats: train/validation/test\n"
        f"cut: texts of more than benchmark.max_length={benchmark.max_length} tokens"
        + (f", answers of more than benchmark.max_target={benchmark.max_target}" if answers else "")
        + "\nrepeats: texts equal to an earlier one (letters and digits only)"
    )
    return _lines(table(header, rows), note, record)


def _domain_table(record: TextDataRecord) -> str:
    header = ["domain", "documents", "pieces", "MB", "repeats", "left out"]
    domains = dict(record["tasks"])
    if base := record["base"]:
        domains[f"{base['name']} (base)"] = base
    rows = [
        [name, "/".join(str(d[split]) for split in SPLITS), "/".join(str(d["pieces"][split]) for split in SPLITS),
         "/".join(f"{d['bytes'][split] / 1e6:.2f}" for split in SPLITS),
         "/".join(str(d["repeats"][split]) for split in SPLITS), str(d["dropped"] or 0)]
        for name, d in domains.items()
    ]  # fmt: skip
    note = "train/validation/test; repeats: documents equal to an earlier one; left out: test pieces found in train"
    groups = "".join(f"\ngroup {name}: {', '.join(members)}" for name, members in record["groups"].items())
    order = f"\norder: {record['order']['order']}, {record['order']['hash']}"
    return _lines(table(header, rows), note + groups + order, record)


def _lines(table: str, note: str, record: DataRecord) -> str:
    return "\n".join([table, "", note, *([account(record["read"])] if record["read"]["read"] else [])])
