"""Where examples come from: the hub, local tables, and what each benchmark makes of them."""

import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from clpet.config import require
from clpet.errors import DataError, suggest
from clpet.metrics import METRICS, need
from clpet.readers import Rows, existing, fill, read_hub, read_local, slots, stdlib_docstrings
from clpet.splits import Splits, by_label, has_labels, named_tasks, partition, sample, split_off
from clpet.tasks import SPLITS, Benchmark, Example, Task, order_names

log = logging.getLogger(__name__)

FREE = ("rouge_l", "bert_score")  # metrics of texts that are no labels


class Kind(Enum):
    """What is asked of the model: one of the objectives."""

    classification = "classification"
    text_to_text = "text_to_text"
    language_modeling = "language_modeling"


class Softmax(Enum):
    """Labels that compete in the loss of a classification."""

    seen = "seen"
    task = "task"


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
    max_test: int | None = None
    shots: int | None = None
    validation_share: float = 0.1
    template: str = "{text}"
    max_length: int = 128
    objective: Kind = Kind.classification
    softmax: Softmax = Softmax.seen
    prompt: str = "{text}"
    max_target: int = 50
    metric: str = "exact_match"
    metrics: dict[str, str] = field(default_factory=dict)

    fields: ClassVar[tuple[str, ...]] = ()  # slots that examples fill beside {text} and {mask}
    cache_dir: ClassVar[str | None] = None  # set by the run: a folder for what other runs can use
    plain_text: ClassVar[bool] = False  # texts to be continued, without labels or answers

    def __post_init__(self) -> None:
        for key in ("max_train", "max_test", "shots"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"benchmark.{key}", value, "at least 1, or null for all")
        require(self.max_length >= 8, "benchmark.max_length", self.max_length, "at least 8 tokens")
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
        known = ("text", "mask", *self.fields)
        fits = all(slot in known for slot in re.findall(r"\{(\w+)\}", self.template))
        slots_there = ", ".join(f"{{{slot}}}" for slot in known)
        require(fits, "benchmark.template", repr(self.template), f"a text whose slots are among {slots_there}")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        """The splits of every task, in listed order."""
        raise DataError(f"{type(self).__name__} does not say how to read its tasks")

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
        folder = existing(data_dir)
        for name in (self.tasks or self.named_order() or self.metrics) if self.answers else ():
            need(self.metrics.get(name, self.metric))
        splits = self.read(folder)
        chosen = self.chosen(splits)
        names = order_names(chosen, self.order, self.orders or {}, self.order_seed)
        if self.tasks and self.named_order() and names != chosen:
            log.warning(
                "tasks are learned as benchmark.order=%s has them; order=listed: as tasks lists them", self.order
            )
        tasks = [self._task(name, splits[name]) for name in names]
        template = self.prompt.rstrip() if self.answers else self.template
        benchmark = Benchmark(self.name, tasks, template, self.max_length, self.max_target if self.answers else 0)
        benchmark.own_softmax = self.softmax is Softmax.task
        benchmark.check()
        return benchmark

    def chosen(self, there: Collection[str]) -> list[str]:
        """The tasks of the sequence, in listed order. Raises DataError for a task that is not there."""
        names = [str(name) for name in self.tasks or self.named_order() or there]
        if len(set(names)) < len(names):
            raise DataError(f"benchmark.tasks names a task twice: {', '.join(names)}")
        for name in names:
            if name not in there:
                raise DataError(f"benchmark.tasks names {name}, which {self.name} does not have{suggest(name, there)}")
        return names

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
        train = sample(train, most, labelled)
        validation = sample(validation, most and max(1, most // 5), labelled)
        test = sample(test, self.max_test, labelled)
        return Task(name, train, validation, test, tuple(sorted(labels)), metric)


@dataclass
class Table(Source):
    """Labelled rows from the hub or from local parquet, jsonl or csv; tasks are groups of labels or a column.

    Tasks come from, in this order: `task` (a column), `task_labels` (task -> labels), `classes_per_task`
    (a number or one a task; labels in string order, or shuffled by `partition_seed`).
    """

    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_columns: dict[str, str] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    text: str = "text"
    label: str = "label"
    task: str | None = None
    task_labels: dict[str, list[str]] | None = None
    classes_per_task: Any = None
    partition_seed: int | None = None
    drop_labels: list[str] = field(default_factory=list)
    where: dict[str, Any] | None = None
    test_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.classes_per_task
        counts = sizes if isinstance(sizes, list) else [1 if sizes is None else sizes]
        fits = all(type(count) is int and count >= 1 for count in counts)
        require(fits, "benchmark.classes_per_task", sizes, "at least 1, or a list of such numbers")
        require(0 < self.test_share < 1, "benchmark.test_share", self.test_share, "in (0, 1)")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        rows = self.rows(data_dir)
        if self.task is not None:
            return self._by_column(rows, self.task)
        splits = {split: [self.example(row) for row in self._kept(part, split)] for split, part in rows.items()}
        self._with_test(splits)
        if self.answers:
            return {self.name: splits}
        return by_label(splits, self.groups(sorted({str(example.target) for example in splits["train"]})))

    def rows(self, data_dir: Path | None) -> dict[str, Rows]:
        """The rows of every split, before they are checked and made into examples."""
        if data_dir is not None:
            return read_local(self.place(data_dir), self.splits)
        if self.hub is None:
            raise DataError(f"benchmark {self.name} is read from local files: say data_dir=FOLDER")
        return read_hub(self.hub, self.hub_config, self.hub_revision, self.splits, self.hub_columns or {})

    def _kept(self, rows: Rows, split: str) -> Iterable[dict[str, Any]]:
        columns = [self.text, self.label, *self.prompt_columns] + ([self.task] if self.task else [])
        rows.need(*(name for column in columns for name in slots(column)))
        where = (self.where or {}).items() if split == "train" else ()
        rows.need(*(column for column, _ in where))
        for number, row in enumerate(rows.values, 1):
            if any(str(row[column]).lower() != str(value).lower() for column, value in where):
                continue
            try:
                label, text = row[self.label], fill(self.text, row)
            except DataError as error:
                raise DataError(f"{rows.where}: row {number}: {error}") from None
            if isinstance(label, float) and label.is_integer():
                label = row[self.label] = int(label)  # a column of whole numbers with a hole is read as floats
            if label is None or not isinstance(label, str | int | bool):
                raise DataError(f"{rows.where}: row {number} has the label {label!r}; a name or a number is needed")
            if not text.strip():
                raise DataError(f"{rows.where}: row {number} has an empty text")
            if str(label) not in self.drop_labels:
                yield row

    def example(self, row: dict[str, Any]) -> Example:
        """One row as an Example; what the prompt needs beside the text becomes its fields."""
        fields = {name: str(row[name]) for name in self.prompt_columns}
        known = row.get("references") or ()
        references = tuple(map(str, [known] if isinstance(known, str) else known)) if self.answers else ()
        return Example(fill(self.text, row), str(row[self.label]), fields, references=references)

    def groups(self, labels: list[str]) -> dict[str, list[str]]:
        """{task: its labels} of labels in the order of their ids."""
        if self.task_labels is not None:
            return self.task_labels
        sizes = self.classes_per_task or len(labels)
        if not isinstance(sizes, list):
            rest = len(labels) % sizes
            sizes = [sizes] * (len(labels) // sizes) + ([rest] if rest else [])
        return named_tasks(partition(labels, sizes, self.partition_seed))

    def _by_column(self, rows: dict[str, Rows], column: str) -> dict[str, Splits]:
        tasks: dict[str, Splits] = {}
        for split, part in rows.items():
            for row in self._kept(part, split):
                tasks.setdefault(str(row[column]), {}).setdefault(split, []).append(self.example(row))
        for splits in tasks.values():
            self._with_test(splits)
        return tasks

    def _with_test(self, splits: Splits) -> None:
        """Cuts a test part from train where there is none."""
        if not splits.get("test"):
            train = splits.get("train", [])
            labelled = not self.answers or has_labels(train)
            splits["train"], splits["test"] = split_off(train, self.test_share, labelled)


@dataclass
class Folders(Source):
    """One folder per task with train, validation and test files; from the hub, one data set per task.

    `label_space=task` keeps the labels of different tasks apart, `union` lets equal names be one label;
    `label_sets` names tasks that share their labels (task -> set). `instructions` (task -> text) fill the
    prompt's {instruction} where the rows have no such column. `words` (task -> label -> word) are what is answered
    for a label. `test_share` is cut from train where there is no test part.
    """

    folders: list[str] = field(default_factory=list)
    text: str = "text"
    label: str = "label"
    label_space: str = "task"
    label_sets: dict[str, str] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    hub_tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    test_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.test_share
        require(share is None or 0 < share < 1, "benchmark.test_share", share, "in (0, 1), or null")
        require(self.label_space in ("task", "union"), "benchmark.label_space", self.label_space, "task or union")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        wanted = [str(name) for name in self.tasks or self.named_order() or self.folders if name in self.folders]
        return {name: self._read_task(name, data_dir) for name in wanted or self.folders}

    def _read_task(self, name: str, data_dir: Path | None) -> Splits:
        kept: dict[str, Any] = {"objective": self.objective, "prompt": self.prompt}
        table = Table(name=name, text=self.text, label=self.label, splits=self.splits, **kept)
        if data_dir is not None:
            rows = read_local(self.place(data_dir) / name, table.splits)
        else:
            if name not in self.hub_tasks:
                raise DataError(f"task {name} of {self.name} has no hub id in its YAML: say data_dir=FOLDER")
            spec = dict(self.hub_tasks[name])
            table = Table(name=name, **{**kept, **spec})
            rows = read_hub(str(table.hub), table.hub_config, table.hub_revision, table.splits, {})
        label = self._labeller(name)
        splits = {}
        for split, part in rows.items():
            if "instruction" in table.prompt_columns and "instruction" not in part.columns:
                part.fill("instruction", self.instructions.get(name, ""))
            examples = [(table.example(row), row[table.label]) for row in table._kept(part, split)]
            splits[split] = [dataclasses.replace(example, target=label(value)) for example, value in examples]
        if self.test_share and not splits.get("test"):
            labelled = not self.answers or has_labels(splits["train"])
            splits["train"], splits["test"] = split_off(splits["train"], self.test_share, labelled)
        return splits

    def _labeller(self, task: str) -> Callable[[Any], str]:
        prefix = "" if self.answers or self.label_space == "union" else f"{(self.label_sets or {}).get(task, task)}: "
        words = self.words.get(task, {})
        return lambda value: prefix + words.get(str(value), str(value))


@dataclass
class PythonStdlib(Source):
    """First paragraphs of the standard library's docstrings; the label is the module they document.

    The text is read from the running Python's own files with `ast` and nothing is imported, so it differs a
    little between Python versions: the benchmark's fingerprint says which text a result is about.
    """

    modules: dict[str, list[str]] = field(default_factory=dict)
    per_label: int = 100
    test_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.per_label >= 4, "benchmark.per_label", self.per_label, "at least 4")
        require(0 < self.test_share < 1, "benchmark.test_share", self.test_share, "in (0, 1)")

    def read(self, data_dir: Path | None) -> dict[str, Splits]:
        chosen = [module for group in self.modules.values() for module in group]
        texts = stdlib_docstrings(chosen)
        examples = [Example(text, module) for module in chosen for text in texts[module][: self.per_label]]
        train, test = split_off(examples, self.test_share)
        return by_label({"train": train, "test": test}, self.modules)
