"""Divides examples into splits and tasks: samples, held-out splits, and tasks as groups of labels.

The draws do not depend on the run's seed, so all runs of a benchmark learn and test the same examples.
"""

import random
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from clpet.config.seeding import derive
from clpet.data.benchmark import Example
from clpet.errors import DataError
from clpet.escape import short_repr

Splits = dict[str, list[Example]]


def label_name(value: object) -> str:
    """A label without surrounding spaces, in Unicode form NFC, so that equal names are one label."""
    return unicodedata.normalize("NFC", str(value)).strip()


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their ids: integers by value, names as strings."""
    names = sorted(labels)
    integers = all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names)
    return sorted(names, key=int) if integers else names


def sample(examples: list[Example], limit: int | None, labelled: bool = True) -> list[Example]:
    """At most `limit` examples, as evenly distributed over the labels (if any) as possible."""
    if limit is None or len(examples) <= limit:
        return examples
    rng = np.random.default_rng(derive(0, "sample", len(examples)))
    # Rank the examples of each label in random order, then take rank 1 of every label, rank 2 of every label, ...
    counts: dict[str | None, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in rng.permutation(len(examples)):
        target = examples[index].target if labelled else None
        counts[target] = counts.get(target, 0) + 1
        ranked.append((counts[target], len(ranked), index))
    return [examples[index] for index in sorted(index for _, _, index in sorted(ranked)[:limit])]


def stratified(examples: list[Example], limit: int | None, labelled: bool = True) -> list[Example]:
    """At most `limit` examples with the labels (if any) in the proportions of `examples`.

    Largest remainder method: each label gets its share rounded down, the rest goes to the largest remainders.
    """
    if limit is None or len(examples) <= limit:
        return examples
    rng = np.random.default_rng(derive(0, "stratified", len(examples)))
    rows: dict[str | None, list[int]] = {}
    for index in rng.permutation(len(examples)).tolist():
        rows.setdefault(examples[index].target if labelled else None, []).append(index)
    shares = {label: divmod(limit * len(indices), len(examples)) for label, indices in rows.items()}
    rest = limit - sum(quotient for quotient, _ in shares.values())
    rounded_up = sorted(shares, key=lambda label: (-shares[label][1], str(label)))[:rest]
    chosen = [indices[: shares[label][0] + (label in rounded_up)] for label, indices in rows.items()]
    return [examples[index] for index in sorted(index for indices in chosen for index in indices)]


def has_labels(train: list[Example], *others: list[Example]) -> bool:
    """Whether targets are labels instead of free text.

    Labels repeat (on average at least twice in `train`), and those of the other splits all occur in `train`.
    """
    targets = {example.target for example in train}
    all_in_train = all(example.target in targets for split in others for example in split)
    return all_in_train and 2 * len(targets) <= len(train)


def split_off(examples: list[Example], share: float, labelled: bool = True) -> tuple[list[Example], list[Example]]:
    """(rest, split): about `share` of the examples of each label, but never its last one."""
    if share == 0:
        return examples, []
    by_label: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.target if labelled else None, []).append(index)
    rng = np.random.default_rng(derive(0, "split", len(examples)))
    chosen: set[int] = set()
    for rows in by_label.values():
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        chosen.update(rng.permutation(rows)[:count].tolist())
    rest = [example for index, example in enumerate(examples) if index not in chosen]
    return rest, [examples[index] for index in sorted(chosen)]


def by_label(splits: Splits, groups: dict[str, list[str]]) -> dict[str, Splits]:
    """One task per group of labels. Raises DataError unless the groups are disjoint and cover the train labels."""
    task_of: dict[str, str] = {}
    for task, labels in groups.items():
        for label in labels:
            if label in task_of:
                raise DataError(f"label {short_repr(label)} is in two tasks, {task_of[label]} and {task}")
            task_of[label] = task
    present = {str(example.target) for example in splits["train"]}
    for split, examples in splits.items():
        for example in examples:
            if str(example.target) not in present:
                label = short_repr(example.target)
                raise DataError(f"label {label} occurs in {split} but not in train, so it cannot be learned")
    missing = sorted(present - task_of.keys())
    if missing:
        first = short_repr(missing[0])
        raise DataError(f"the label partition does not cover {len(missing)} labels of the data, e.g. {first}")
    absent = sorted(task_of.keys() - present)
    if absent:
        raise DataError(f"the label partition names {len(absent)} labels the data lacks, e.g. {short_repr(absent[0])}")
    tasks: dict[str, Splits] = {task: {split: [] for split in splits} for task in groups}
    for split, examples in splits.items():
        for example in examples:
            tasks[task_of[str(example.target)]][split].append(example)
    return tasks


def partition(names: list[str], sizes: list[int], seed: int | None) -> list[list[str]]:
    """ConPET's label partition: label ids are shuffled with Python's generator, cut into groups, each group sorted.

    Ids are indices of `names`. Without a seed they are not shuffled. Raises DataError unless the sizes add up to the
    number of names.
    """
    if sum(sizes) != len(names):
        raise DataError(f"the label partition has {sum(sizes)} slots for {len(names)} labels")
    ids = list(range(len(names)))
    if seed is not None:
        random.Random(seed).shuffle(ids)
    groups, start = [], 0
    for size in sizes:
        groups.append([names[i] for i in sorted(ids[start : start + size])])
        start += size
    return groups


def named_tasks(groups: list[list[str]]) -> dict[str, list[str]]:
    """Groups of labels as tasks named task01, task02, ..."""
    return {f"task{i + 1:02d}": labels for i, labels in enumerate(groups)}
