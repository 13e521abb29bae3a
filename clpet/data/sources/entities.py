"""Benchmarks about entities in a sentence: markers around mentions, ConPET's label partitions and splits."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from clpet.config.schema import require
from clpet.data.benchmark import SPLITS, Example, Truncate
from clpet.data.data_files import note_unread
from clpet.data.sources import Table
from clpet.data.sources.entity_formats import LAYOUTS, convert, read_published
from clpet.data.splits import Splits, named_tasks
from clpet.data.tabular_files import Row, SplitRows, TableLayout, read_hub, read_local
from clpet.errors import DataError
from clpet.escape import short_repr


@dataclass
class Entities(Table):
    """A table of tokenised sentences with the positions of entity mentions.

    A folder with train.parquet is read unchanged. Published files and rows from the hub are converted from `layout`,
    and split again if `resplit` is set.
    """

    tokens: str = "tokens"
    template_words: int | None = None
    label_order: list[str] | None = None
    task_ids: list[list[int]] | None = None
    layout: str | None = None
    published: dict[str, str] | None = None
    hub_splits: dict[str, str] | None = None
    resplit: str | None = None
    obtain: str | None = None
    names: dict[str, str] | None = None

    reads_single_file: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.template_words
        require(words is None or words >= 1, "benchmark.template_words", words, "at least 1, or null")
        unset = self.truncate is Truncate.end and self.cut_last is None
        require(
            unset, "benchmark.truncate and benchmark.cut_last", "set", "unset: a sentence is cut around its entities"
        )
        require(self.chat is None, "benchmark.chat", "set", "null: the entities of a sentence are marked in its text")
        valid = self.layout is None or self.layout in LAYOUTS
        require(valid, "benchmark.layout", self.layout, f"{', '.join(LAYOUTS)} or null")
        require(self.resplit in (None, "label", "all"), "benchmark.resplit", self.resplit, "label, all or null")
        valid = set(self.names or {}) <= set(self.fields)
        require(valid, "benchmark.names", self.names, f"a column for each of {', '.join(self.fields)}, or null")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        tasks = super().read(data_dir)
        if self.template_words is not None:
            for splits in tasks.values():
                short = [example for example in splits["train"] if self.words_around(example) <= self.template_words]
                self.report.drop("beyond benchmark.template_words", len(splits["train"]) - len(short))
                splits["train"] = short
        return tasks

    def words_around(self, example: Example) -> int:
        """Number of words of the filled template without the text."""
        template = self.template.replace("{text}", " ")
        for slot, value in example.fields.items():
            template = template.replace(f"{{{slot}}}", value)
        return len(template.split())

    def rows(self, data_dir: Path | None) -> dict[str, SplitRows]:
        if data_dir is None:
            return self._resplit(self._from_hub())
        folder = self.data_root(data_dir)
        if not self.published or (folder / f"{self.splits['train']}.parquet").is_file():
            return read_local(folder, self.splits, self.report, TableLayout(self.encoding, self.header))
        missing = [name for name in self.published.values() if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {', '.join(missing)}: {self._instructions()}")
        note_unread(folder, [folder / name for name in self.published.values()], self.report)
        layout = str(self.layout)
        return self._resplit({split: read_published(folder / name, layout) for split, name in self.published.items()})

    def _instructions(self) -> str:
        files = ", ".join((self.published or {}).values())
        folder = f"FOLDER/{self.folder or self.name}"
        return f"put {files} of {self.obtain} into {folder} and set data_dir=FOLDER"

    def _from_hub(self) -> dict[str, list[Row]]:
        if self.hub is None:
            raise DataError(f"benchmark {self.name} is read from your own files: {self._instructions()}")
        splits = self.hub_splits or self.splits
        by_split = read_hub(self.hub, self.hub_config, self.hub_revision, splits, self.hub_columns or {})
        if self.layout is None:
            return {split: rows.values for split, rows in by_split.items()}
        return {split: convert(rows.values, self.layout, rows.origin) for split, rows in by_split.items()}

    def _resplit(self, splits: dict[str, list[Row]]) -> dict[str, SplitRows]:
        """The rows without dropped labels, in their published splits or split again."""
        for split, rows in splits.items():
            self.report.read[f"{self.name}/{split}"] += len(rows)
            splits[split] = [row for row in rows if str(row.get(self.label)) not in self.drop_labels]
            self.report.drop("benchmark.drop_labels", len(rows) - len(splits[split]))
        if self.resplit is not None:
            pooled = [row for rows in splits.values() for row in rows]
            rng = random.Random(self.partition_seed or 0)
            splits = shuffle_and_split(self._pools(pooled, rng), rng)
        return {
            split: SplitRows(f"{self.name}/{split}", set(rows[0] if rows else ()), rows)
            for split, rows in splits.items()
        }

    def _pools(self, rows: list[Row], rng: random.Random) -> list[list[Row]]:
        """The sets of rows that are each split 80/10/10: all rows, or those of each label, task by task.

        The labels are shuffled once before, without using the result: ConPET splits FewRel with the generator that has
        drawn its label partition, so the draws that follow only match if that draw is repeated.
        """
        if self.resplit == "all":
            return [rows]
        by_label: dict[str, list[Row]] = {}
        for row in rows:
            by_label.setdefault(str(row.get(self.label)), []).append(row)
        groups = self.groups(sorted(by_label))
        rng.shuffle(list(range(len(by_label))))
        return [by_label[label] for labels in groups.values() for label in labels]

    def groups(self, labels: list[str]) -> dict[str, list[str]]:
        names = self.label_order or labels
        if self.task_ids is None:
            return super().groups(names)
        if sorted(label for ids in self.task_ids for label in ids) != list(range(len(names))):
            count = sum(map(len, self.task_ids))
            raise DataError(f"the label partition has {count} slots for {len(names)} labels: see benchmark.task_ids")
        return named_tasks([[names[label] for label in ids] for ids in self.task_ids])

    def examples(self, rows: SplitRows, split: str) -> list[tuple[Row, Example]]:
        if lacking := sorted(set((self.names or {}).values()) - rows.columns):
            columns = " or ".join(lacking)
            self.report.other_notes.append(f"{rows.origin} has no column {columns}: names are taken from the tokens")
        return super().examples(rows, split)

    def columns(self) -> list[str]:
        return [self.tokens, *self._roles(), *(column for column in super().columns() if column != self.text)]

    def example(self, row: Row) -> Example:
        """The marked sentence; the template's slots are the entities' names, by default their first mentions."""
        for column in (self.tokens, *self._roles()):
            if not isinstance(row.get(column), list):
                raise DataError(f"no list in column {column}")
        tokens = [str(token) for token in row[self.tokens]]
        if not any(token.strip() for token in tokens):
            raise DataError("an empty text")
        try:
            spans = {role: mentions(row[column]) for role, column in zip(self.fields, self._roles(), strict=True)}
        except (TypeError, ValueError):
            raise DataError("positions that are not integers") from None
        for role, positions in spans.items():
            if not positions or not all(0 <= first <= last < len(tokens) for first, last in positions):
                raise DataError(f"the {role} at {short_repr(positions)} in a sentence of {len(tokens)} tokens")
        names = {role: str(row[column]) for role, column in (self.names or {}).items() if row.get(column)}
        return mark_entities(tokens, spans, str(row[self.label]), names)

    def _roles(self) -> list[str]:
        return [getattr(self, role) for role in self.fields]


@dataclass
class Relations(Entities):
    """Relation extraction: head wrapped in [m0] [m1], tail in [m2] [m3], every listed mention (ConPET, section 2)."""

    head: str = "head_pos"
    tail: str = "tail_pos"

    fields = ("head", "tail")


@dataclass
class Typing(Entities):
    """Entity typing: one example per mention, wrapped in [m0] [m1] (ConPET, section 2)."""

    entity: str = "entity_pos"

    fields = ("entity",)


def shuffle_and_split(pools: Iterable[list[Row]], rng: random.Random) -> dict[str, list[Row]]:
    """Each pool shuffled and split: the first int(0.8 n) rows train, the next int(0.1 n) validation, the rest test."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for pool in pools:
        rng.shuffle(pool)
        cuts = int(0.8 * len(pool)), int(0.8 * len(pool)) + int(0.1 * len(pool))
        for split, rows in zip(SPLITS, (pool[: cuts[0]], pool[cuts[0] : cuts[1]], pool[cuts[1] :]), strict=True):
            splits[split] += rows
    return splits


def mentions(positions: Sequence[int | Sequence[int]]) -> list[tuple[int, int]]:
    """(first, last) token position of each mention, from a flat list of positions or a list of lists."""
    groups = [cast(Sequence[int], group) if hasattr(group, "__len__") else [group] for group in positions]
    spans: list[tuple[int, int]] = []
    for group in groups:
        for position in map(int, group):
            if spans and position == spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], position)
            else:
                spans.append((position, position))
    return spans


def mark_entities(
    tokens: list[str], roles: dict[str, list[tuple[int, int]]], target: str, names: Mapping[str, str] | None = None
) -> Example:
    """The sentence with a pair of markers around the mentions of each role; `entity_spans` are the first mentions.

    The fields are the `names` of the roles, by default their first mentions.
    """
    opening: dict[int, list[str]] = {}
    closing: dict[int, list[str]] = {}
    for number, spans in enumerate(roles.values()):
        for first, last in spans:
            opening.setdefault(first, []).append(f"[m{2 * number}]")
            closing.setdefault(last, []).insert(0, f"[m{2 * number + 1}]")
    pieces, length, starts, ends = [], 0, {}, {}
    for index, token in enumerate(tokens):
        piece = " ".join([*opening.get(index, []), token, *closing.get(index, [])])
        starts[index] = length
        pieces.append(piece)
        length += len(piece) + 1
        ends[index] = length - 1
    firsts = {role: spans[0] for role, spans in roles.items()}
    fields = {role: " ".join(tokens[first : last + 1]) for role, (first, last) in firsts.items()} | dict(names or {})
    entity_spans = tuple((starts[first], ends[last]) for first, last in firsts.values())
    return Example(" ".join(pieces), target, fields, entity_spans)
