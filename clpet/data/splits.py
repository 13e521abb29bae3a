"""Examples into splits and tasks: samples spread over labels, parts cut off, tasks made of groups of labels."""

import random
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from clpet.config.seeding import derive
from clpet.data.benchmark import Example
from clpet.errors import DataError
from clpet.escape import short_repr

Splits = dict[str, list[Example]]


def label_name(value: Any) -> str:
    """A label without outer spaces, in Unicode form NFC: two spellings of one name are one label."""
    return unicodedata.normalize("NFC", str(value)).strip()


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their ids: whole numbers by size, names as strings."""
    found = sorted(labels)
    whole = all(re.fullmatch(r"[+-]?[0-9]+", label) for label in found)
    return sorted(found, key=int) if whole else found


def sample(examples: list[Example], most: int | None, labelled: bool = True) -> list[Example]:
    """At most `most` examples, spread evenly over the labels if any; the same ones whatever the run's seed."""
    if most is None or len(examples) <= most:
        return examples
    rng = np.random.default_rng(derive(0, "sample", len(examples)))
    turns: dict[str | None, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in rng.permutation(len(examples)):
        target = examples[index].target if labelled else None
        turns[target] = turns.get(target, 0) + 1
        ranked.append((turns[target], len(ranked), index))
    return [examples[index] for index in sorted(index for _, _, index in sorted(ranked)[:most])]


def stratified(examples: list[Example], most: int | None, labelled: bool = True) -> list[Example]:
    """At most `most` examples, the labels, if any, in their proportions; the same ones whatever the run's seed.

    Each label gets the whole part of its share; what is left goes to the largest remainders.
    """
    if most is None or len(examples) <= most:
        return examples
    rng = np.random.default_rng(derive(0, "stratified", len(examples)))
    rows: dict[str | None, list[int]] = {}
    for index in rng.permutation(len(examples)).tolist():
        rows.setdefault(examples[index].target if labelled else None, []).append(index)
    shares = {label: divmod(most * len(own), len(examples)) for label, own in rows.items()}
    rest = most - sum(whole for whole, _ in shares.values())
    favoured = sorted(shares, key=lambda label: (-shares[label][1], str(label)))[:rest]
    taken = [own[: shares[label][0] + (label in favoured)] for label, own in rows.items()]
    return [examples[index] for index in sorted(index for part in taken for index in part)]


def has_labels(train: list[Example], *others: list[Example]) -> bool:
    """Whether targets are labels, which come back and are all known from training, or answers free in their words."""
    targets = {example.target for example in train}
    known = all(example.target in targets for part in others for example in part)
    return known and 2 * len(targets) <= len(train)


def split_off(examples: list[Example], share: float, labelled: bool = True) -> tuple[list[Example], list[Example]]:
    """(rest, part): `part` is about `share` of each label's examples, never a label's last one."""
    if share == 0:
        return examples, []
    by_label: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.target if labelled else None, []).append(index)
    rng = np.random.default_rng(derive(0, "split", len(examples)))
    part: set[int] = set()
    for rows in by_label.values():
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        part.update(rng.permutation(rows)[:count].tolist())
    rest = [example for index, example in enumerate(examples) if index not in part]
    return rest, [examples[index] for index in sorted(part)]


def by_label(splits: Splits, groups: dict[str, list[str]]) -> dict[str, Splits]:
    """One task per group of labels. Raises DataError unless the groups are disjoint and cover the train labels."""
    owner: dict[str, str] = {}
    for task, labels in groups.items():
        for label in labels:
            if label in owner:
                raise DataError(f"label {short_repr(label)} is in two tasks, {owner[label]} and {task}")
            owner[label] = task
    present = {str(example.target) for example in splits["train"]}
    for split, examples in splits.items():
        for example in examples:
            if str(example.target) not in present:
                label = short_repr(example.target)
                raise DataError(f"label {label} occurs in {split} but not in train, so it cannot be learned")
    missing = sorted(present - owner.keys())
    if missing:
        first = short_repr(missing[0])
        raise DataError(f"the label partition does not cover {len(missing)} labels of the data, e.g. {first}")
    absent = sorted(owner.keys() - present)
    if absent:
        raise DataError(f"the label partition names {len(absent)} labels the data lacks, e.g. {short_repr(absent[0])}")
    tasks: dict[str, Splits] = {task: {split: [] for split in splits} for task in groups}
    for split, examples in splits.items():
        for example in examples:
            tasks[owner[str(example.target)]][split].append(example)
    return tasks


def partition(names: list[str], sizes: list[int], seed: int | None) -> list[list[str]]:
    """ConPET's label partition: ids, the places in `names`, shuffled with Python's generator, cut, each part sorted.

    Without a seed they are cut as they stand. Raises DataError unless the sizes add up to all names.
    """
    if sum(sizes) != len(names):
        raise DataError(f"the label partition has {sum(sizes)} places for {len(names)} labels")
    ids = list(range(len(names)))
    if seed is not None:
        random.Random(seed).shuffle(ids)
    parts, start = [], 0
    for size in sizes:
        parts.append([names[i] for i in sorted(ids[start : start + size])])
        start += size
    return parts


def named_tasks(parts: list[list[str]]) -> dict[str, list[str]]:
    """task01, task02, ...: groups of labels that have no names of their own."""
    return {f"task{i + 1:02d}": part for i, part in enumerate(parts)}
