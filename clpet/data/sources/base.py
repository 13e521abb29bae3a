"""What every benchmark has: options, order, sizes, checks. A source says how to read its tasks."""

import dataclasses
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from clpet.config.schema import require
from clpet.data.benchmark import SPLITS, Benchmark, Example, Task, Truncate
from clpet.data.read_report import ReadReport
from clpet.data.splits import Splits, has_labels, in_order, sample, split_off, stratified
from clpet.data.tabular_files import existing, slots
from clpet.data.task_order import order_tasks
from clpet.errors import ConfigError, DataError, suggest
from clpet.metrics.text_scores import FREE, METRICS, need

log = logging.getLogger(__name__)


class Kind(Enum):
    """What is asked of the model: one of the objectives."""

    classification = "classification"
    text_to_text = "text_to_text"
    language_modeling = "language_modeling"


class Softmax(Enum):
    """Labels that compete in the loss of a classification; auto becomes one of the others with the method."""

    auto = "auto"
    seen = "seen"
    task = "task"


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass
class Source:
    """Knobs every benchmark has. A subclass says how to `read` its tasks; order, sizes and checks are here."""

    name: str = ""
    folder: str | None = None
    tasks: list[str] | None = None
    order: Any = "listed"
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
    keep: Any = None  # or a dict by task
    objective: Kind = Kind.classification
    softmax: Softmax = Softmax.auto
    prompt: str = "{text}"
    max_target: int = 50
    metric: str = "exact_match"
    metrics: dict[str, str] = field(default_factory=dict)
    skip_bad: bool = False

    fields: ClassVar[tuple[str, ...]] = ()  # slots that examples fill beside {text} and {mask}
    cache_dir: ClassVar[str | None] = None  # set by the run: a folder for what other runs can use
    plain_text: ClassVar[bool] = False  # texts to be continued, without labels or answers

    def __post_init__(self) -> None:
        self.report = ReadReport()  # of the last reading
        for key in ("max_train", "max_validation", "max_test", "shots"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"benchmark.{key}", value, "at least 1, or null for all")
        require(self.max_length >= 8, "benchmark.max_length", self.max_length, "at least 8 tokens")
        for name, pattern in (self.keep if isinstance(self.keep, dict) else {"": self.keep}).items():
            fits = pattern is None or (isinstance(pattern, str) and is_pattern(pattern))
            require(fits, f"benchmark.keep{name and '.' + name}", repr(pattern), "a regular expression, or null")
        require(self.max_target >= 1, "benchmark.max_target", self.max_target, "at least 1 token")
        own = self.softmax is Softmax.task and self.answers
        require(not own, "benchmark.softmax", "task", "seen with objective=text_to_text")
        for metric in (self.metric, *self.metrics.values()):
            require(metric in METRICS, "benchmark.metric", metric, " or ".join(METRICS))
        require(0 <= self.validation_share < 1, "benchmark.validation_share", self.validation_share, "in [0, 1)")
        for key in ("template", "prompt"):
            value = getattr(self, key)
            require(value.count("{text}") == 1, f"benchmark.{key}", repr(value), "a text that contains {text} once")
        fits = (self.objective is Kind.language_modeling) == self.plain_text
        wanted = "language_modeling" if self.plain_text else "classification or text_to_text for labelled data"
        require(fits, "benchmark.objective", self.objective.value, wanted)
        if self.plain_text:
            self._check_unread()
        known = ("text", "mask", *self.fields)
        fits = all(slot in known for slot in re.findall(r"\{(\w+)\}", self.template))
        slots_there = ", ".join(f"{{{slot}}}" for slot in known)
        require(fits, "benchmark.template", repr(self.template), f"a text whose slots are among {slots_there}")

    def _check_unread(self) -> None:
        """Raises ConfigError for an option that plain text does not read."""
        usual = Source()
        for key in ("template", "softmax", "prompt", "max_target", "metric", "metrics", "truncate", "keep"):
            value = getattr(self, key)
            if value != getattr(usual, key):
                shown = value.value if isinstance(value, Enum) else value
                raise ConfigError(f"benchmark.{key}={shown} has no effect on plain text: leave it out")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        """The splits of every task, in listed order."""
        raise DataError(f"{type(self).__name__} does not say how to read its tasks")

    def settle(self, mixes_tasks: bool) -> None:
        """Replaces softmax=auto: all seen labels compete where the loss sees several tasks, else a task's own.

        Without this rule a method without replay forgets by its softmax: every step on a new task pushes the logits
        of all old labels down, whatever the method protects.
        """
        if self.softmax is Softmax.auto:
            self.softmax = Softmax.seen if mixes_tasks or self.objective is not Kind.classification else Softmax.task

    @property
    def answers(self) -> bool:
        """Whether targets are answers to be written, not labels to be told apart."""
        return self.objective is Kind.text_to_text

    @property
    def prompt_columns(self) -> list[str]:
        """Columns that the prompt reads beside {text}."""
        return [slot for slot in slots(self.prompt) if slot != "text"] if self.answers else []

    def named_order(self) -> list[str] | None:
        """The tasks of the published order that `order` names, if it names one."""
        return (self.orders or {}).get(self.order) if isinstance(self.order, str) else None

    def place(self, data_dir: Path) -> Path:
        """The benchmark's own folder inside data_dir, or data_dir itself."""
        inner = data_dir / (self.folder or self.name)
        return inner if inner.is_dir() else data_dir

    def load(self, data_dir: str | None) -> Benchmark:
        """The benchmark in training order, limited, with a validation part in every task. Raises DataError."""
        folder, self.report = existing(data_dir), ReadReport()
        for name in (self.tasks or self.named_order() or self.metrics) if self.answers else ():
            need(self.metrics.get(name, self.metric))
        splits = self.read(folder)
        chosen = self.chosen(splits)
        names = order_tasks(chosen, self.order, self.orders or {}, self.order_seed)
        if self.tasks and self.named_order() and names != chosen:
            log.warning(
                "tasks are learned as benchmark.order=%s has them; order=listed: as tasks lists them", self.order
            )
        for name in splits.keys() - set(names):
            self.report.drop("in tasks that are not learned", sum(map(len, splits[name].values())))
        tasks = [self._task(name, splits[name]) for name in names]
        template = self.prompt.rstrip() if self.answers else self.template
        benchmark = Benchmark(self.name, tasks, template, self.max_length, self.max_target if self.answers else 0)
        benchmark.truncate = self.truncate
        benchmark.per_task_softmax = self.softmax is Softmax.task
        benchmark.report = self.report
        benchmark.check()
        return benchmark

    def drop_bad(self) -> None:
        """Drops and counts the bad rows read so far. Raises DataError, which names them, unless `skip_bad`."""
        self.report.drop("bad", self.report.drop_bad_rows(self.skip_bad))

    def chosen(self, there: Collection[str]) -> list[str]:
        """The tasks of the sequence, in listed order. Raises DataError for a task that is not there."""
        names = [str(name) for name in self.tasks or self.named_order() or there]
        if len(set(names)) < len(names):
            raise DataError(f"benchmark.tasks names a task twice: {', '.join(names)}")
        for name in names:
            if name not in there:
                raise DataError(f"benchmark.tasks names {name}, which {self.name} does not have{suggest(name, there)}")
        return names

    def most_validation(self, train: int | None) -> int | None:
        """Validation examples of a task at most, where it has at most `train` to learn from."""
        return self.max_validation or (train and max(1, train // 5))

    def _task(self, name: str, splits: Splits) -> Task:
        train, validation, test = (list(splits.get(split, [])) for split in SPLITS)
        metric = self.metrics.get(name, self.metric) if self.answers else "accuracy"
        labelled = not self.answers or (metric not in FREE and has_labels(train, validation, test))
        if not validation:
            train, validation = split_off(train, self.validation_share, labelled)
        labels = {str(example.target) for example in train if example.target is not None} if labelled else set()
        most = self.shots * max(1, len(labels)) if self.shots else self.max_train
        if most is not None and most < len(labels):
            raise DataError(f"benchmark.max_train={most} is too few for the {len(labels)} labels of task {name}")
        cut = {
            "train": sample(train, most, labelled),
            "validation": sample(validation, self.most_validation(most), labelled),
            "test": stratified(test, self.max_test, labelled),
        }
        reason = "beyond benchmark.shots" if self.shots else "beyond benchmark.max_train"
        held = "beyond benchmark.max_validation" if self.max_validation else reason
        self.report.drop(reason, len(train) - len(cut["train"]))
        self.report.drop(held, len(validation) - len(cut["validation"]))
        self.report.drop("beyond benchmark.max_test", len(test) - len(cut["test"]))
        train, validation, test = self._keeping(name, *cut.values())
        return Task(name, train, validation, test, tuple(in_order(labels)), metric)

    def _keeping(self, task: str, *parts: list[Example]) -> list[list[Example]]:
        """The examples with what `keep` finds in their texts marked as not to be cut."""
        pattern = self.keep.get(task) if isinstance(self.keep, dict) else self.keep
        if pattern is None:
            return list(parts)
        spans = [[tuple(found.span() for found in re.finditer(pattern, e.text)) for e in part] for part in parts]
        missing = sum(not found for part in spans for found in part)
        if missing:
            total = sum(map(len, parts))
            log.warning("benchmark.keep finds nothing to keep in %d of %d texts of task %s", missing, total, task)
        pairs = [zip(part, found, strict=True) for part, found in zip(parts, spans, strict=True)]
        return [[dataclasses.replace(e, protected_spans=tuple(found)) for e, found in pair] for pair in pairs]
