"""Base class of all sources: the options, order, size limits and checks that every benchmark has."""

import copy
import dataclasses
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from clpet.config.schema import NamesOrRule, Patterns, require
from clpet.data import chat_template
from clpet.data.benchmark import SPLITS, Benchmark, Example, Task, Truncate, Turns
from clpet.data.read_report import ReadReport
from clpet.data.splits import Splits, has_labels, in_order, sample, split_off, stratified
from clpet.data.tabular_files import Row, cell_text, column_names, data_path, row_text
from clpet.data.task_order import order_tasks
from clpet.data.traits import LABELS, Traits
from clpet.errors import ConfigError, DataError, suggest
from clpet.metrics.text_scores import FREE, METRICS, need

if TYPE_CHECKING:  # `clpet report` reads data and must not wait for torch
    from clpet.models.backbone import Backbone

log = logging.getLogger(__name__)


class Softmax(Enum):
    """The labels that the softmax of a classification loss covers; `auto` is resolved with the method."""

    auto = "auto"
    seen = "seen"
    task = "task"


def is_pattern(text: str) -> bool:
    """Whether a text is a valid regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass
class Source:
    """Base of all benchmarks. A subclass overrides `read`, which returns the splits of every task."""

    name: str = ""
    folder: str | None = None
    tasks: list[str] | None = None
    order: NamesOrRule = "listed"
    order_seed: int = 0
    orders: dict[str, list[str]] | None = None
    max_train: int | None = None
    max_validation: int | None = None
    max_test: int | None = None
    shots: int | None = None
    validation_share: float = 0.1
    template: str = "{text}"
    max_length: int = 128
    truncate: Truncate = Truncate.end
    cut_last: Patterns = None  # a regular expression, or {task: regular expression}
    softmax: Softmax = Softmax.auto
    prompt: str = "{text}"
    chat: Turns | None = None
    max_target: int = 50
    metric: str = "exact_match"
    metrics: dict[str, str] = field(default_factory=dict)
    skip_bad: bool = False

    fields: ClassVar[tuple[str, ...]] = ()  # template slots in addition to {text} and {mask}
    task_slots: ClassVar[dict[str, dict[str, str]]] = {}  # slot -> {task: its value for rows without such a column}
    cache_dir: ClassVar[str | None] = None  # set by the run: a folder for files that later runs can reuse
    reads_single_file: ClassVar[bool] = False  # data_dir may be a file
    plain_text: ClassVar[bool] = False  # texts for language modelling, without labels or answers
    # Set by `reading_for`: the objective's name, its capabilities, and columns that its examples have as fields.
    objective: ClassVar[str] = "classification"
    traits: ClassVar[Traits] = LABELS
    extra_columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.report = ReadReport()  # of the last `load`
        for key in ("max_train", "max_validation", "max_test", "shots"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"benchmark.{key}", value, "at least 1, or null for all")
        require(self.max_length >= 8, "benchmark.max_length", self.max_length, "at least 8 tokens")
        for name, pattern in (self.cut_last if isinstance(self.cut_last, dict) else {"": self.cut_last}).items():
            valid = pattern is None or (isinstance(pattern, str) and is_pattern(pattern))
            require(valid, f"benchmark.cut_last{name and '.' + name}", repr(pattern), "a regular expression, or null")
        require(self.max_target >= 1, "benchmark.max_target", self.max_target, "at least 1 token")
        for metric in (self.metric, *self.metrics.values()):
            require(metric in METRICS, "benchmark.metric", metric, " or ".join(METRICS))
        require(0 <= self.validation_share < 1, "benchmark.validation_share", self.validation_share, "in [0, 1)")
        for key in ("template", "prompt"):
            value = getattr(self, key)
            require(value.count("{text}") == 1, f"benchmark.{key}", repr(value), "a text that contains {text} once")
        if self.plain_text:
            self._check_unused()
        slots = ("text", "mask", *self.fields)
        valid = all(slot in slots for slot in re.findall(r"\{(\w+)\}", self.template))
        allowed = ", ".join(f"{{{slot}}}" for slot in slots)
        require(valid, "benchmark.template", repr(self.template), f"a text whose slots are among {allowed}")

    def reading_for(self, objective: str, traits: Traits, extra_columns: tuple[str, ...] = ()) -> Self:
        """This source as one that reads examples for an objective. Raises ConfigError if it has no such examples."""
        if traits.plain_text != self.plain_text:
            has = "plain text: use objective=language_modeling" if self.plain_text else "labels or answers"
            raise ConfigError(f"objective={objective} does not suit benchmark={self.name}, which has {has}")
        source = copy.copy(self)
        vars(source).update(objective=objective, traits=traits, extra_columns=extra_columns)
        source.check_objective()
        return source

    def check_objective(self) -> None:
        """Raises ConfigError for an option that does not suit the objective."""
        if self.softmax is Softmax.task and self.answers:
            raise ConfigError(f"benchmark.softmax must be seen with objective={self.objective}, not task")
        if self.chat and not self.traits.generates_text:
            raise ConfigError(f"benchmark.chat={self.chat.value} needs objective=text_to_text, not {self.objective}")

    def check_backbone(self, backbone: "Backbone") -> None:
        """Raises ConfigError for conversations with a model that is not a decoder, or without the template it names."""
        from clpet.models.backbone import Architecture

        if self.chat and backbone.architecture is not Architecture.decoder:
            raise ConfigError(
                f"benchmark.chat={self.chat.value} needs a decoder, which model {backbone.name} is not: "
                "model=qwen3_0_6b, for example"
            )
        if self.chat:
            chat_template.template_text(backbone)

    def _check_unused(self) -> None:
        """Raises ConfigError for an option that is set but has no effect on plain text."""
        defaults = Source()
        for key in ("template", "softmax", "prompt", "chat", "max_target", "metric", "metrics", "truncate", "cut_last"):
            value = getattr(self, key)
            if value != getattr(defaults, key):
                shown = value.value if isinstance(value, Enum) else value
                raise ConfigError(f"benchmark.{key}={shown} has no effect on plain text: remove it")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        """The splits of every task, in listed order."""
        raise DataError(f"the source {type(self).__name__} does not implement read()")

    def per_task_softmax(self, mixes_tasks: bool) -> bool:
        """Whether the softmax is over each task's labels. `auto`: not for a method whose batches mix tasks.

        With `seen`, a method without replay would forget because of its softmax alone: every step on a new task lowers
        the logits of all old labels, whatever the method protects.
        """
        if self.softmax is Softmax.auto:
            return self.traits.has_labels and not mixes_tasks
        return self.softmax is Softmax.task

    @property
    def answers(self) -> bool:
        """Whether targets are answers in words instead of labels to classify."""
        return self.traits.in_words

    def labelled(self, *splits: list[Example]) -> bool:
        """Whether the targets of these examples are labels, by which splits and samples are balanced."""
        return not self.answers or (self.traits.generates_text and has_labels(*splits))

    @property
    def prompt_columns(self) -> list[str]:
        """Columns that the prompt reads in addition to {text}."""
        return [slot for slot in column_names(self.prompt) if slot != "text"] if self.answers else []

    @property
    def text_column(self) -> str:
        """The column that {text} is read from, or several of them in a text with slots."""
        return str(getattr(self, "text", "text"))

    @property
    def slots(self) -> list[str]:
        """The columns that a new text needs besides that of the text: the other slots of the template or prompt."""
        if self.plain_text or self.answers:
            return self.prompt_columns
        return sorted({slot for slot in re.findall(r"\{(\w+)\}", self.template) if slot not in ("text", "mask")})

    def input_columns(self, available: Collection[str], task_given: bool) -> list[str]:
        """The columns that a table of new texts must have; `text` will do in place of the benchmark's own."""
        columns = column_names(self.text_column)
        text = ["text"] if "text" in available and not set(columns) <= set(available) else columns
        filled = self.task_slots.keys() - set(available) if task_given else set()
        return [*text, *(slot for slot in self.slots if slot not in filled)]

    def new_text(self, row: Row, task: str | None) -> dict[str, object]:
        """The text of a row with `input_columns`, and the template's other slots. Raises DataError for a bad row."""
        columns = set(column_names(self.text_column))
        text = row_text(self.text_column if columns <= row.keys() else "text", row)
        if not text.strip():
            raise DataError("an empty text")
        given = {slot: values.get(task or "", "") for slot, values in self.task_slots.items()}
        return {
            "text": text,
            **{slot: cell_text(row[slot], slot) if slot in row else given[slot] for slot in self.slots},
        }

    def named_order(self) -> list[str] | None:
        """The tasks of the published order that `order` names; None for any other order."""
        return (self.orders or {}).get(self.order) if isinstance(self.order, str) else None

    def data_root(self, data_dir: Path) -> Path:
        """The benchmark's sub-folder of data_dir, or data_dir itself if it has no such folder."""
        subfolder = data_dir / (self.folder or self.name)
        return subfolder if subfolder.is_dir() else data_dir

    def load(self, data_dir: str | None) -> Benchmark:
        """The benchmark: tasks in training order, limited in size, each with a validation split. Raises DataError."""
        folder, self.report = data_path(data_dir, self.reads_single_file), ReadReport()
        for name in (self.tasks or self.named_order() or [*self.metrics, ""]) if self.traits.generates_text else ():
            need(self.metrics.get(name, self.metric))
        splits = self.read(folder)
        chosen = self.chosen(splits)
        names = order_tasks(chosen, self.order, self.orders or {}, self.order_seed)
        if self.tasks and self.named_order() and names != chosen:
            log.warning(
                "tasks are learned in the order of benchmark.order=%s; set order=listed for the order of "
                "benchmark.tasks", self.order,
            )  # fmt: skip
        for name in splits.keys() - set(names):
            self.report.drop("in tasks that are not learned", sum(map(len, splits[name].values())))
        tasks = [self._task(name, splits[name]) for name in names]
        benchmark = self.benchmark_of(tasks)
        benchmark.check()
        return benchmark

    def benchmark_of(self, tasks: list[Task]) -> Benchmark:
        """The tasks with this source's templates and lengths."""
        return Benchmark(
            self.name,
            tasks,
            self.prompt.rstrip() if self.answers else self.template,
            self.max_length,
            self.max_target if self.answers else 0,
            self.truncate,
            report=self.report,
            traits=self.traits,
            chat=self.chat,
        )

    def drop_bad(self) -> None:
        """Drops and counts the bad rows read so far. Raises DataError, which lists them, unless `skip_bad`."""
        self.report.drop("bad", self.report.drop_bad_rows(self.skip_bad))

    def chosen(self, available: Collection[str]) -> list[str]:
        """The tasks of the sequence, in listed order. Raises DataError for a task that is not available."""
        names = [str(name) for name in self.tasks or self.named_order() or available]
        if len(set(names)) < len(names):
            raise DataError(f"benchmark.tasks names a task twice: {', '.join(names)}")
        for name in names:
            if name not in available:
                hint = suggest(name, available)
                raise DataError(f"benchmark.tasks names {name}, which {self.name} does not have{hint}")
        return names

    def validation_limit(self, train: int | None) -> int | None:
        """Maximum validation examples of a task with at most `train` train examples; a fifth of them by default."""
        return self.max_validation or (train and max(1, train // 5))

    def _task(self, name: str, splits: Splits) -> Task:
        train, validation, test = (list(splits.get(split, [])) for split in SPLITS)
        metric = self.metrics.get(name, self.metric) if self.traits.generates_text else "accuracy"
        labelled = metric not in FREE and self.labelled(train, validation, test)
        if not validation:
            train, validation = split_off(train, self.validation_share, labelled)
        labels = {str(example.target) for example in train if example.target is not None} if labelled else set()
        limit = self.shots * max(1, len(labels)) if self.shots else self.max_train
        if limit is not None and limit < len(labels):
            raise DataError(f"benchmark.max_train={limit} is too few for the {len(labels)} labels of task {name}")
        limited = {
            "train": sample(train, limit, labelled),
            "validation": sample(validation, self.validation_limit(limit), labelled),
            "test": stratified(test, self.max_test, labelled),
        }
        reason = "beyond benchmark.shots" if self.shots else "beyond benchmark.max_train"
        validation_reason = "beyond benchmark.max_validation" if self.max_validation else reason
        self.report.drop(reason, len(train) - len(limited["train"]))
        self.report.drop(validation_reason, len(validation) - len(limited["validation"]))
        self.report.drop("beyond benchmark.max_test", len(test) - len(limited["test"]))
        train, validation, test = self._protect(name, *limited.values())
        return Task(name, train, validation, test, tuple(in_order(labels)), metric)

    def protect(self, task: str | None, examples: Sequence[Example]) -> list[Example]:
        """The examples with the matches of `cut_last` in their texts as protected spans.

        Raises ConfigError if the pattern depends on the task and none is given.
        """
        pattern = self.cut_last
        if isinstance(pattern, dict):
            if task is None:
                raise ConfigError("benchmark.cut_last differs between tasks: name the task of the texts")
            pattern = pattern.get(task)
        if pattern is None:
            return list(examples)
        return [
            dataclasses.replace(e, protected_spans=tuple(match.span() for match in re.finditer(pattern, e.text)))
            for e in examples
        ]

    def _protect(self, task: str, *splits: list[Example]) -> list[list[Example]]:
        """The protected examples of every split; texts without a match are counted in a warning."""
        result = [self.protect(task, examples) for examples in splits]
        if self.cut_last is None or (isinstance(self.cut_last, dict) and task not in self.cut_last):
            return result
        unmatched = sum(not example.protected_spans for examples in result for example in examples)
        if unmatched:
            total = sum(map(len, splits))
            log.warning("benchmark.cut_last matches nothing in %d of %d texts of task %s", unmatched, total, task)
        return result
