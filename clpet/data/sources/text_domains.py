"""Domains of plain text for continual pretraining: their splits, sizes, order, and decontamination."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

from clpet.config.schema import require
from clpet.data.benchmark import Benchmark, Task
from clpet.data.data_files import SPLIT_NAMES, domain_files, named_splits, text_files
from clpet.data.decontamination import decontaminate
from clpet.data.document_readers import open_readers
from clpet.data.documents import Documents
from clpet.data.read_report import ReadReport
from clpet.data.sources import Source
from clpet.data.tabular_files import data_path
from clpet.data.task_order import balanced, order_domains
from clpet.data.traits import PLAIN_TEXT, Traits
from clpet.errors import DataError, suggest
from clpet.records import OrderRecord

log = logging.getLogger(__name__)


class Balance(Enum):
    """How the train splits of domains are limited to comparable sizes."""

    none = "none"
    min = "min"
    cap = "cap"


@dataclass
class Domains(Source):
    """Base of benchmarks of plain text. A subclass overrides `names`, the domains, and `corpora`, their texts."""

    validation_share: float = 0.01
    test_share: float = 0.01
    balance: Balance = Balance.none
    max_bytes: int | None = None
    drop_above: int | None = None
    base: str | None = None
    max_base: int | None = None
    reference: str | None = None
    groups: dict[str, list[str]] | None = None
    source_order: list[str] | None = None
    order_encoder: str = "auto"
    order_samples: int = 500
    decontaminate: bool = True
    add_bos: bool = False
    document_mask: bool = False
    stream: bool = False

    plain_text: ClassVar[bool] = True
    objective: ClassVar[str] = "language_modeling"
    traits: ClassVar[Traits] = PLAIN_TEXT

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shots is None, "benchmark.shots", self.shots, "null: domains have no labels")
        require(0 < self.test_share < 0.5, "benchmark.test_share", self.test_share, "in (0, 0.5)")
        require(self.order_samples >= 1, "benchmark.order_samples", self.order_samples, "at least 1")
        for key in ("max_bytes", "drop_above"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"benchmark.{key}", value, "at least 1 byte, or null")
        require(self.max_base is None or self.max_base >= 1, "benchmark.max_base", self.max_base, "at least 1, or null")
        consistent = (self.balance is Balance.cap) == (self.max_bytes is not None)
        require(consistent, "benchmark.max_bytes", self.max_bytes, "set with balance=cap, and only then")
        separate = self.base not in (self.tasks or [])
        require(separate, "benchmark.base", self.base, "none of benchmark.tasks: it is not part of the sequence")

    def names(self, data_dir: Path | None) -> list[str]:
        """All available domains, in listed order."""
        raise DataError(f"the source {type(self).__name__} does not implement names()")

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        """The splits of a domain that its files provide, at least train."""
        raise DataError(f"the source {type(self).__name__} does not implement corpora()")

    def sources(self) -> dict[str, list[str]]:
        """Group -> its domains. Reports score groups too, and order=similar_hier keeps their domains together."""
        return self.groups or {}

    def parents(self) -> dict[str, str]:
        """Domain -> its sub-group inside the group, for order=similar_hier."""
        return {}

    def load(self, data_dir: str | None) -> Benchmark:
        """The benchmark: domains in training order, split, limited, balanced and decontaminated. Raises DataError."""
        folder, self.report = data_path(data_dir, self.reads_single_file), ReadReport("documents")
        available = self.names(folder)
        if self.base is not None and self.base not in available:
            hint = suggest(self.base, available)
            raise DataError(f"benchmark.base={self.base} is not a domain of {self.name}{hint}")
        names = [name for name in self.chosen([name for name in available if name != self.base]) if name != self.base]
        full = {name: self.split(name, folder) for name in [*names, *([self.base] if self.base else [])]}
        if self.drop_above is not None:
            large = [name for name, splits in full.items() if self._too_large(name, splits["train"])]
            self._drop("in domains above drop_above", *(split for name in large for split in full.pop(name).values()))
        tasks = self._tasks(full)
        base = tasks.pop(self.base) if self.base else None
        if not tasks:
            raise DataError(f"benchmark {self.name} has no domains left")
        trains = {name: full[name]["train"] for name in tasks}
        order = self._ordering(trains, self._reference(full, available, folder))
        benchmark = Benchmark(
            self.name,
            [tasks[name] for name in order["names"]],
            max_length=self.max_length,
            traits=self.traits,
            groups=self._groups(available, list(order["names"])),
            base=base,
            order=order,
            report=self.report,
            add_bos=self.add_bos,
            document_mask=self.document_mask,
            stream=self.stream,
        )
        benchmark.check()
        return benchmark

    def split(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        """The three splits of a domain; those without files are cut from train, document by document."""
        splits = self.corpora(name, data_dir)
        train = splits["train"]
        for documents in splits.values():
            len(documents)  # builds the index, which reads the files and reports bad rows
        self.report.drop_bad_rows(self.skip_bad)
        if not len(train):
            raise DataError(f"domain {name} of benchmark {self.name} is empty")
        test, validation = splits.get("test"), splits.get("validation")
        if test is None:
            train, test = train.split_off(self.test_share)
            if not len(test):
                raise DataError(
                    f"domain {name} of benchmark {self.name} has a single document, so no test split can be cut from it"
                )
        if validation is None:
            train, validation = train.split_off(self.validation_share)
        return {"train": train, "validation": validation, "test": test}

    def _drop(self, reason: str, *splits: Documents, remaining: Iterable[Documents] = ()) -> None:
        """Reports as dropped the documents of `splits` that are not among the `remaining` ones."""
        before, after = (sum(documents.num_documents for documents in group) for group in (splits, remaining))
        self.report.drop(reason, before - after)

    def _too_large(self, name: str, train: Documents) -> bool:
        large = train.bytes > (self.drop_above or 0)
        if large and name == self.base:
            raise DataError(f"benchmark.base={name} has {train.bytes} bytes, above drop_above={self.drop_above}")
        if large:
            log.warning("domain %s is left out: %d bytes, above drop_above=%d", name, train.bytes, self.drop_above)
        return large

    def _tasks(self, full: dict[str, dict[str, Documents]]) -> dict[str, Task]:
        """One task per domain: limits are applied first, then the balance inside the sequence, then decontamination.

        Test texts are compared to the full train splits, so that the test set does not depend on the limits of train.
        """
        train = self._limited_train(full)
        validation_limit = self.validation_limit(self.max_train)
        validation = [splits["validation"].limited(validation_limit) for splits in full.values()]
        test = [splits["test"].limited(self.max_test) for splits in full.values()]
        for name, remaining in (("train", train.values()), ("validation", validation), ("test", test)):
            self._drop("beyond the limits", *(splits[name] for splits in full.values()), remaining=remaining)
        if self.decontaminate:
            limited, test = test, decontaminate(test, [splits["train"] for splits in full.values()])
            self._drop("found in train", *limited, remaining=test)
        for name, documents in zip(full, test, strict=True):
            if not len(documents) and documents.num_contaminated:
                raise DataError(f"every piece of the test texts of domain {name} also occurs in train")
        return {
            name: Task(name, train[name], validation_documents, test_documents, metric="perplexity")
            for name, validation_documents, test_documents in zip(full, validation, test, strict=True)
        }

    def _limited_train(self, full: dict[str, dict[str, Documents]]) -> dict[str, Documents]:
        """The train splits, limited by max_train (the base by max_base), and those of the sequence balanced."""
        limits = {self.base: self.max_base or self.max_train}
        train = {name: splits["train"].limited(limits.get(name, self.max_train)) for name, splits in full.items()}
        names = [name for name in full if name != self.base]
        if self.balance is not Balance.none and names:
            rule = "min" if self.balance is Balance.min else f"cap={self.max_bytes}"
            sizes = balanced([train[name].bytes for name in names], rule)
            train |= {name: train[name].limited(size=size) for name, size in zip(names, sizes, strict=True)}
        return train

    def _ordering(self, trains: dict[str, Documents], reference: Documents | None) -> OrderRecord:
        """The record of the order. Domains are compared by a sample of their full train texts, whatever the limits."""
        ordering = order_domains(
            {name: _texts(train.limited(self.order_samples)) for name, train in trains.items()},
            self.order,
            published=self.orders or {},
            seed=self.order_seed,
            reference=None if reference is None else _texts(reference.limited(5 * self.order_samples)),
            sources=self.sources(),
            parents=self.parents(),
            source_order=self.source_order,
            samples=self.order_samples,
            reference_samples=5 * self.order_samples,
            encoder=self.order_encoder,
            cache_dir=self.cache_dir,
        )
        return ordering.record()

    def _reference(
        self, full: dict[str, dict[str, Documents]], available: list[str], data_dir: Path | None
    ) -> Documents | None:
        """The corpus whose most similar domain comes first with order=similar: a domain, a folder or a file."""
        if self.reference is None:
            return None
        if self.reference in full:
            return full[self.reference]["train"]
        if self.reference in available:
            splits = self.split(self.reference, data_dir)
            self._drop("of the reference", *splits.values())
            return splits["train"]
        path = Path(self.reference).expanduser()
        if not path.exists():
            raise DataError(
                f"benchmark.reference={self.reference} is neither a domain of {self.name} nor a file or folder"
                f"{suggest(self.reference, available)}"
            )
        files = [path] if path.is_file() else text_files(path, self.report)
        reference = Documents.of(*open_readers(files, "text", "doc_id", self.report))
        self._drop("of the reference", reference)
        self.report.drop_bad_rows(self.skip_bad)
        return reference

    def _groups(self, available: list[str], names: list[str]) -> dict[str, list[str]]:
        """The groups with their domains in training order, without domains that are not in the sequence."""
        for group, members in (self.groups or {}).items():
            for name in members:
                if name not in available:
                    hint = suggest(name, available)
                    raise DataError(f"benchmark.groups.{group} names {name}, which is not a domain{hint}")
        groups = {group: [name for name in names if name in members] for group, members in self.sources().items()}
        return {group: members for group, members in groups.items() if members}


def _texts(documents: Documents) -> Iterator[str]:
    return (example.text for example in documents)


@dataclass
class TextDomains(Domains):
    """A sub-folder or file per domain: txt, jsonl or parquet.

    - A folder with files named after splits (train, validation, val, dev, test, or in parts: train-1, train-2) uses
      those splits, and its other files are not read. A folder without such names is split.
    - A row of a table is a document; with a column `document`, consecutive rows with the same value are its pieces.
    - Several txt files are one document each. A single or large txt file is a text without document boundaries.
    """

    domains: list[str] = field(default_factory=list)
    text: str = "text"
    document: str = "doc_id"

    reads_single_file: ClassVar[bool] = True

    def names(self, data_dir: Path | None) -> list[str]:
        if data_dir is None:
            raise DataError(f"benchmark {self.name} is read from local files: set data_dir=FOLDER")
        root = self.data_root(data_dir)
        available = domain_files(root, self.report)
        if not available:
            raise DataError(f"{root} has no domains: a sub-folder or a file (txt, jsonl, parquet) for each is expected")
        splits = sorted(SPLIT_NAMES.keys() & available)
        if splits:
            raise DataError(f"{root}: {', '.join(splits)} are splits, not domains: make a sub-folder for each domain")
        for name in self.domains:
            if name not in available:
                raise DataError(f"{root} has no domain {name}{suggest(name, available)}")
        return list(self.domains) or sorted(available)

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        assert data_dir is not None
        root = self.data_root(data_dir)
        files = named_splits(domain_files(root, self.report)[name], root, self.report)
        return {
            split: Documents.of(*open_readers(paths, self.text, self.document, self.report))
            for split, paths in files.items()
        }
