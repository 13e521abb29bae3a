"""Benchmarks about entities in a sentence: markers around mentions, ConPET's splits."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from clpet.errors import DataError
from clpet.readers import Rows, read_hub
from clpet.sources import Splits, Table
from clpet.tasks import SPLITS, Example


@dataclass
class Relations(Table):
    """Relation extraction: head wrapped in [m0] [m1], tail in [m2] [m3], every listed mention (ConPET, section 2)."""

    tokens: str = "tokens"
    head: str = "head_pos"
    tail: str = "tail_pos"
    hub_parts: list[str] = field(default_factory=list)

    fields: ClassVar[tuple[str, ...]] = ("head", "tail")

    def example(self, row: dict[str, Any]) -> Example:
        """The marked sentence; the template's {head} and {tail} are the first mentions."""
        for column in (self.tokens, self.head, self.tail):
            if row.get(column) is None:
                raise DataError(f"benchmark {self.name}: column {column} is missing or empty; found {sorted(row)}")
        tokens = [str(token) for token in row[self.tokens]]
        return mark_entities(tokens, mentions(row[self.head]), mentions(row[self.tail]), str(row[self.label]))

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        if data_dir is not None or not self.hub_parts:
            return super().read(data_dir)
        parts = {part: part for part in self.hub_parts}
        found = read_hub(str(self.hub), self.hub_config, self.hub_revision, parts, self.hub_columns or {})
        pooled = [self.example(flat(row)) for part in parts for row in found[part].values]
        groups = self._groups({"train": pooled})
        return pooled_split(pooled, groups, self.partition_seed or 0)

    def _kept(self, rows: Rows, split: str) -> Iterable[dict[str, Any]]:
        rows.need(self.tokens, self.head, self.tail)
        for row in rows.values:
            row.setdefault(self.text, " ".join(map(str, row[self.tokens])))
        rows.columns.add(self.text)
        return super()._kept(rows, split)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the published FewRel with its entities' token positions as columns."""
    return {**row, "head_pos": row["head"]["indices"], "tail_pos": row["tail"]["indices"]}


def pooled_split(examples: list[Example], groups: dict[str, list[str]], seed: int) -> dict[str, Splits]:
    """80/10/10 per label with the generator that shuffled the labels going on, as ConPET splits FewRel."""
    rng = random.Random(seed)
    rng.shuffle(list(range(sum(len(labels) for labels in groups.values()))))
    tasks: dict[str, Splits] = {}
    for task, labels in groups.items():
        tasks[task] = {split: [] for split in SPLITS}
        for label in labels:
            own = [example for example in examples if example.target == label]
            rng.shuffle(own)
            cuts = int(0.8 * len(own)), int(0.8 * len(own)) + int(0.1 * len(own))
            for split, part in zip(SPLITS, (own[: cuts[0]], own[cuts[0] : cuts[1]], own[cuts[1] :]), strict=True):
                tasks[task][split] += part
    return tasks


def mentions(positions: Any) -> list[tuple[int, int]]:
    """[first, last] token positions of each mention, from a flat list of positions or a list of lists."""
    flat = [list(part) if hasattr(part, "__len__") else [part] for part in positions]
    spans: list[tuple[int, int]] = []
    for part in flat:
        for position in map(int, part):
            if spans and position == spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], position)
            else:
                spans.append((position, position))
    return spans


def mark_entities(
    tokens: list[str], heads: list[tuple[int, int]], tails: list[tuple[int, int]], target: str
) -> Example:
    """The sentence with markers around every mention; `focus` covers the first head and the first tail."""
    opening: dict[int, list[str]] = {}
    closing: dict[int, list[str]] = {}
    for spans, left, right in ((heads, "[m0]", "[m1]"), (tails, "[m2]", "[m3]")):
        for first, last in spans:
            opening.setdefault(first, []).append(left)
            closing.setdefault(last, []).insert(0, right)
    pieces, length, starts, ends = [], 0, {}, {}
    for index, token in enumerate(tokens):
        piece = " ".join([*opening.get(index, []), token, *closing.get(index, [])])
        starts[index] = length
        pieces.append(piece)
        length += len(piece) + 1
        ends[index] = length - 1
    fields = {"head": " ".join(tokens[heads[0][0] : heads[0][1] + 1])}
    fields["tail"] = " ".join(tokens[tails[0][0] : tails[0][1] + 1])
    focus = tuple((starts[first], ends[last]) for first, last in (heads[0], tails[0]))
    return Example(" ".join(pieces), target, fields, focus)
