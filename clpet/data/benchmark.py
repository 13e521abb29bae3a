"""What is learned: examples, tasks and the ordered benchmark."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from clpet.config.seeding import derive
from clpet.data.read_report import ReadReport
from clpet.errors import DataError
from clpet.escape import short_repr

SPLITS = ("train", "validation", "test")


_NOT_WORD = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Lower-case letters and digits only: texts that differ in case, spaces and punctuation are the same."""
    return _NOT_WORD.sub("", text.lower())


class Truncate(Enum):
    """Which side of a text is cut where not all of it fits."""

    end = "end"
    start = "start"
    middle = "middle"


@dataclass(frozen=True)
class Example:
    """A text and its target.

    `target` is a label name, an answer text, or None for plain text. `fields` are the values of the template's other
    slots. Two kinds of character spans of the text steer truncation: the window is centred on `entity_spans`, and
    `protected_spans` are cut last. `references` are all correct answers, if there are others than `target`.
    """

    text: str
    target: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    entity_spans: tuple[tuple[int, int], ...] = ()
    protected_spans: tuple[tuple[int, int], ...] = ()
    references: tuple[str, ...] = ()


@dataclass
class Task:
    """One step of the sequence. No labels and metric perplexity: language modelling, whose splits are Documents."""

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"

    def split(self, name: str) -> Sequence[Example]:
        """The examples of one of SPLITS."""
        return getattr(self, name)


@dataclass
class Benchmark:
    """The ordered tasks; label ids are positions in `labels`, which lists them in order of first appearance."""

    name: str
    tasks: list[Task]
    template: str = "{text}"
    max_length: int = 128
    max_target: int = 0
    truncate: Truncate = Truncate.end
    length_set: bool = False  # max_length was asked for: a model that cannot read as much is refused
    per_task_softmax: bool = False  # the loss compares the labels of an example's own task only
    reserved_positions: int = 0  # positions of the model that a method's prompts take, at most
    begin: bool = False  # every document begins with the tokenizer's begin token
    isolate: bool = False  # documents in one window of text do not see each other
    base: Task | None = None  # text that the model is made on before the first task
    data_record: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)  # of domains, reported apart
    report: ReadReport = field(default_factory=ReadReport)  # what reading it skipped, repaired and dropped
    order: dict[str, Any] = field(default_factory=dict)  # how the domains were ordered, and its hash
    stream: bool = False  # texts are read as they are trained on, not tokenised beforehand

    def __post_init__(self) -> None:
        self.labels: list[str] = list(dict.fromkeys(label for task in self.tasks for label in task.labels))
        self.label_ids = {label: index for index, label in enumerate(self.labels)}

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> list[str]:
        """Task names in training order."""
        return [task.name for task in self.tasks]

    @property
    def direction(self) -> str:
        """Which scores are better: higher, or lower for perplexities."""
        return "lower" if self.tasks[0].metric.endswith("perplexity") else "higher"

    def seed_key(self, index: int) -> int | str:
        """What the random draws of a task are named by: its place, or a domain's name, so that others do not matter."""
        return index if self.direction == "higher" else self.names[index]

    def task_labels(self, index: int) -> list[int]:
        """Label ids of one task."""
        return [self.label_ids[label] for label in self.tasks[index].labels]

    def seen_labels(self, learned: int) -> list[int]:
        """Label ids of the first `learned` tasks."""
        return sorted({label for index in range(learned) for label in self.task_labels(index)})

    def fingerprint(self) -> str:
        """Hash of every text and target in order: it changes when the data does."""
        hasher = hashlib.sha256()
        for task in [*self.tasks, *([self.base] if self.base else [])]:
            for split in SPLITS:
                hasher.update(f"\x1e{task.name}\x1e{split}".encode(errors="surrogatepass"))
                for part in _bytes(task.split(split)):
                    hasher.update(part)
        return hasher.hexdigest()[:16]

    def fingerprints(self, split: str) -> dict[str, str]:
        """{task: hash of its examples in a split}: scores on equal ones can be paired."""
        parts = {task.name: b"\x1e".join(_bytes(task.split(split))) for task in self.tasks}
        return {name: hashlib.sha256(part).hexdigest()[:16] for name, part in parts.items()}

    def check(self) -> None:
        """Raises DataError for a task that cannot be learned or tested as given."""
        if not self.tasks:
            raise DataError(f"benchmark {self.name} has no tasks")
        for task in self.tasks:
            for split in ("train", "test"):
                if not task.split(split):
                    raise DataError(f"task {task.name} of benchmark {self.name} has no {split} examples")
            if not task.labels:
                continue
            trained = {example.target for example in task.train}
            for split, example in _labelled(task):
                if example.target not in trained:
                    raise DataError(
                        f"task {task.name} of benchmark {self.name}: label {short_repr(example.target)} occurs in "
                        f"{split} but not in train, so it cannot be learned"
                    )


def _bytes(examples: Sequence[Example]) -> Iterator[bytes]:
    """All that the examples of a split hold, one after the other; of plain text its own fingerprint."""
    from clpet.data.documents import Documents

    if isinstance(examples, Documents):
        yield examples.fingerprint().encode()
        return
    for example in examples:
        parts = (example.text, str(example.target), *example.fields.values(), *example.references)
        yield "\x1f".join(parts).encode(errors="surrogatepass")


def _labelled(task: Task) -> Iterator[tuple[str, Example]]:
    for split in ("validation", "test"):
        for example in task.split(split):
            yield split, example


def order_names(names: list[str], order: Any, orders: Mapping[str, list[str]], seed: int) -> list[str]:
    """Task names in training order.

    `order` is listed, reversed, random (a permutation drawn from `seed`), the name of one of the benchmark's
    published `orders`, or an explicit list. Raises DataError when it names tasks that are not there.
    """
    if isinstance(order, str) and order in orders:
        order = [name for name in orders[order] if name in names]
    if isinstance(order, list | tuple):
        if sorted(map(str, order)) != sorted(names):
            raise DataError(f"benchmark.order must list every task once; the tasks are: {', '.join(names)}")
        return [str(name) for name in order]
    if order == "listed":
        return list(names)
    if order == "reversed":
        return list(reversed(names))
    if order == "random":
        return [names[i] for i in np.random.default_rng(derive(seed, "task order")).permutation(len(names))]
    known = ["listed", "reversed", "random", *orders]
    raise DataError(f"benchmark.order={order} is none of {', '.join(known)}, nor a list of tasks")
