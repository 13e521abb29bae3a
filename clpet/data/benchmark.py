"""Examples, tasks, and the benchmark: tasks in training order."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from clpet.data.read_report import ReadReport
from clpet.data.traits import LABELS, Traits
from clpet.errors import DataError
from clpet.escape import short_repr
from clpet.records import OrderRecord

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """The lower-case letters and digits of a text, to compare texts without case, spaces and punctuation."""
    return _NOT_ALPHANUMERIC.sub("", text.lower())


class Truncate(Enum):
    """The end of a text that is cut when the text is too long."""

    end = "end"
    start = "start"
    middle = "middle"


class Turns(Enum):
    """The turns of the assistant in a conversation whose tokens are in the loss."""

    all = "all"
    last = "last"


@dataclass(frozen=True)
class Example:
    """A text and its target.

    `target` is a label name, an answer text, or None for plain text. `fields` are the values of the template's other
    slots. Two kinds of character spans of the text steer truncation: the window is centred on `entity_spans`, and
    `protected_spans` are cut last. `references` are all correct answers, if there are others than `target`. `origin` is
    the file and row, where an error can only be found later.
    """

    text: str
    target: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    entity_spans: tuple[tuple[int, int], ...] = ()
    protected_spans: tuple[tuple[int, int], ...] = ()
    references: tuple[str, ...] = ()
    origin: str = field(default="", compare=False)


@runtime_checkable
class Fingerprinted(Protocol):
    """A split that computes a hash of its texts, as Documents do from their index."""

    def fingerprint(self) -> str:
        """Hash of all texts in order."""


@dataclass(frozen=True)
class Task:
    """One step of the sequence. For language modelling its splits are Documents, without labels."""

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"

    def split(self, name: str) -> Sequence[Example]:
        """The examples of one of SPLITS."""
        examples: Sequence[Example] = getattr(self, name)
        return examples


@dataclass(frozen=True)
class Benchmark:
    """Tasks in training order, never changed: what depends on the method or the model is set in a copy of it."""

    name: str
    tasks: list[Task]
    template: str = "{text}"
    max_length: int = 128
    max_target: int = 0
    truncate: Truncate = Truncate.end
    traits: Traits = LABELS  # of the objective that its examples were read for
    length_set: bool = False  # max_length was set by the user: a model with a smaller maximum raises an error
    per_task_softmax: bool = False  # the softmax of the loss is over the labels of the example's task only
    reserved_positions: int = 0  # maximum number of the model's positions that a method's prompts occupy
    add_bos: bool = False  # every document begins with the tokenizer's BOS token
    document_mask: bool = False  # documents in one window do not attend to each other
    base: Task | None = None  # corpus that a model with random weights is pretrained on before the first task
    groups: dict[str, list[str]] = field(default_factory=dict)  # {group: domains} that reports also score together
    report: ReadReport = field(default_factory=ReadReport)  # rows and files that were skipped, repaired or dropped
    order: OrderRecord = field(default_factory=lambda: OrderRecord())  # record of how the domains were ordered
    stream: bool = False  # tokenise texts during training instead of beforehand
    chat: Turns | None = None  # examples are conversations in the model's chat template

    @cached_property
    def labels(self) -> list[str]:
        """All labels in order of first appearance; a label's id is its index."""
        return list(dict.fromkeys(label for task in self.tasks for label in task.labels))

    @cached_property
    def label_ids(self) -> dict[str, int]:
        """{label: id}."""
        return {label: index for index, label in enumerate(self.labels)}

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> list[str]:
        """Task names in training order."""
        return [task.name for task in self.tasks]

    @property
    def direction(self) -> str:
        """`higher` or, for perplexities, `lower`: which scores are better."""
        return "lower" if self.traits.lower_is_better else "higher"

    def seed_key(self, index: int) -> int | str:
        """The key of a task's random streams: its index, or the name of a domain of plain text.

        With its name, a domain draws the same numbers whatever other domains the sequence contains.
        """
        return self.names[index] if self.traits.plain_text else index

    def task_labels(self, index: int) -> list[int]:
        """Label ids of one task."""
        return [self.label_ids[label] for label in self.tasks[index].labels]

    def seen_labels(self, learned: int) -> list[int]:
        """Label ids of the first `learned` tasks."""
        return sorted({label for index in range(learned) for label in self.task_labels(index)})

    def texts(self, split: str) -> list[str]:
        """The texts of a split, those of the first task first: the order of the rows of an EncodedDataset."""
        return [example.text for task in self.tasks for example in task.split(split)]

    def fingerprint(self) -> str:
        """Hash of all texts and targets in order."""
        hasher = hashlib.sha256()
        for task in [*self.tasks, *([self.base] if self.base else [])]:
            for split in SPLITS:
                hasher.update(f"\x1e{task.name}\x1e{split}".encode(errors="surrogatepass"))
                for content in _contents(task.split(split)):
                    hasher.update(content)
        return hasher.hexdigest()[:16]

    @staticmethod
    def task_fingerprint(task: Task) -> str:
        """Hash of the texts and targets of one task, all splits, in order."""
        hasher = hashlib.sha256()
        for split in SPLITS:
            hasher.update(f"\x1e{split}".encode())
            for content in _contents(task.split(split)):
                hasher.update(content)
        return hasher.hexdigest()[:16]

    def fingerprints(self, split: str) -> dict[str, str]:
        """{task: hash of its examples in a split}. Scores of two runs on equal examples can be compared in pairs."""
        contents = {task.name: b"\x1e".join(_contents(task.split(split))) for task in self.tasks}
        return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents.items()}

    def check(self) -> None:
        """Raises DataError for a task without train or test examples, or with test labels missing from train."""
        if not self.tasks:
            raise DataError(f"benchmark {self.name} has no tasks")
        for task in self.tasks:
            for split in ("train", "test"):
                if not task.split(split):
                    raise DataError(f"task {task.name} of benchmark {self.name} has no {split} examples{_single(task)}")
            if not task.labels:
                continue
            train_labels = {example.target for example in task.train}
            for split, example in _held_out(task):
                if example.target not in train_labels:
                    raise DataError(
                        f"task {task.name} of benchmark {self.name}: label {short_repr(example.target)} occurs in "
                        f"{split} but not in train, so it cannot be learned"
                    )


def _single(task: Task) -> str:
    """The reason why no example of a task can be held out, if that is because of its labels."""
    if len(task.labels) < 2 or len(task.train) > len(task.labels):
        return ""
    return f": each of its {len(task.labels)} labels has a single example. Are the labels numbers, or texts?"


def _contents(examples: Sequence[Example]) -> Iterator[bytes]:
    """The text, target, fields and references of every example, or the fingerprint of a split that computes one."""
    if isinstance(examples, Fingerprinted):
        yield examples.fingerprint().encode()
        return
    for example in examples:
        values = (example.text, str(example.target), *example.fields.values(), *example.references)
        yield "\x1f".join(values).encode(errors="surrogatepass")


def _held_out(task: Task) -> Iterator[tuple[str, Example]]:
    for split in ("validation", "test"):
        for example in task.split(split):
            yield split, example
