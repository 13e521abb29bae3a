"""Domains of plain text for continual pretraining: how they are split, sized, ordered and kept apart."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from clpet.config.schema import require
from clpet.data.benchmark import Benchmark, Task
from clpet.data.data_files import SPLIT_NAMES, domain_files, named_splits, text_files
from clpet.data.decontamination import decontaminate
from clpet.data.document_readers import open_readers
from clpet.data.documents import Documents
from clpet.data.read_report import ReadReport
from clpet.data.sources import Kind, Source
from clpet.data.tabular_files import data_folder
from clpet.data.task_order import balanced, order_domains
from clpet.errors import DataError, suggest

log = logging.getLogger(__name__)


class Balance(Enum):
    """How the train parts of domains are made comparable in size."""

    none = "none"
    min = "min"
    cap = "cap"


@dataclass
class Domains(Source):
    """Plain text in domains. A subclass says which domains there are and what their files give; the rest is here."""

    objective: Kind = Kind.language_modeling
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
    begin: bool = False
    isolate: bool = False
    stream: bool = False

    plain_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shots is None, "benchmark.shots", self.shots, "null: domains have no labels")
        require(0 < self.test_share < 0.5, "benchmark.test_share", self.test_share, "in (0, 0.5)")
        require(self.order_samples >= 1, "benchmark.order_samples", self.order_samples, "at least 1")
        for key in ("max_bytes", "drop_above"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"benchmark.{key}", value, "at least 1 byte, or null")
        require(self.max_base is None or self.max_base >= 1, "benchmark.max_base", self.max_base, "at least 1, or null")
        capped = (self.balance is Balance.cap) == (self.max_bytes is not None)
        require(capped, "benchmark.max_bytes", self.max_bytes, "given with balance=cap, and only then")
        apart = self.base not in (self.tasks or [])
        require(apart, "benchmark.base", self.base, "none of benchmark.tasks: it is kept out of the sequence")

    def names(self, data_dir: Path | None) -> list[str]:
        """All domains that are there, in listed order."""
        raise DataError(f"{type(self).__name__} does not say which domains it has")

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        """The splits of a domain that its files give, train at least."""
        raise DataError(f"{type(self).__name__} does not say where its domains lie")

    def sources(self) -> dict[str, list[str]]:
        """Group -> its domains: what figures are also given by, and what order=similar_hier keeps together."""
        return self.groups or {}

    def parents(self) -> dict[str, str]:
        """Domain -> the group inside its source, for order=similar_hier."""
        return {}

    def load(self, data_dir: str | None) -> Benchmark:
        """The benchmark in training order, split, limited, balanced and decontaminated. Raises DataError."""
        folder, self.report = data_folder(data_dir), ReadReport("documents")
        there = self.names(folder)
        if self.base is not None and self.base not in there:
            raise DataError(f"benchmark.base={self.base} is no domain of {self.name}{suggest(self.base, there)}")
        names = [name for name in self.chosen([name for name in there if name != self.base]) if name != self.base]
        full = {name: self.split(name, folder) for name in [*names, *([self.base] if self.base else [])]}
        if self.drop_above is not None:
            large = [name for name, parts in full.items() if self._too_large(name, parts["train"])]
            self._drop("in domains above drop_above", *(part for name in large for part in full.pop(name).values()))
        tasks = self._tasks(full)
        base = tasks.pop(self.base) if self.base else None
        if not tasks:
            raise DataError(f"benchmark {self.name} has no domains left")
        trains = {name: full[name]["train"] for name in tasks}
        order = self._ordering(trains, self._reference(full, there, folder))
        benchmark = Benchmark(self.name, [tasks[name] for name in order["names"]], max_length=self.max_length)
        benchmark.groups = self._groups(there, list(order["names"]))
        benchmark.base, benchmark.order, benchmark.report = base, order, self.report
        benchmark.begin, benchmark.isolate, benchmark.stream = self.begin, self.isolate, self.stream
        benchmark.check()
        return benchmark

    def split(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        """A domain's three splits; what its files lack is cut from train in whole documents."""
        found = self.corpora(name, data_dir)
        train = found["train"]
        for part in found.values():
            len(part)  # reads the files
        self.report.drop_bad_rows(self.skip_bad)
        if not len(train):
            raise DataError(f"domain {name} of benchmark {self.name} is empty")
        test, validation = found.get("test"), found.get("validation")
        if test is None:
            train, test = train.split_off(self.test_share)
            if not len(test):
                raise DataError(
                    f"domain {name} of benchmark {self.name} has a single document: no test part can be cut"
                )
        if validation is None:
            train, validation = train.split_off(self.validation_share)
        return {"train": train, "validation": validation, "test": test}

    def _drop(self, reason: str, *parts: Documents, kept: Iterable[Documents] = ()) -> None:
        """Counts the documents of `parts` that `kept` does not have."""
        self.report.drop(reason, sum(part.num_documents for part in parts) - sum(part.num_documents for part in kept))

    def _too_large(self, name: str, train: Documents) -> bool:
        large = train.bytes > (self.drop_above or 0)
        if large and name == self.base:
            raise DataError(f"benchmark.base={name} has {train.bytes} bytes, above drop_above={self.drop_above}")
        if large:
            log.warning("domain %s is left out: %d bytes, above drop_above=%d", name, train.bytes, self.drop_above)
        return large

    def _tasks(self, full: dict[str, dict[str, Documents]]) -> dict[str, Task]:
        """Limits first, then the balance inside the sequence; test texts are compared to all of train."""
        most = self.validation_limit(self.max_train)
        limits = {self.base: self.max_base or self.max_train}
        train = {name: parts["train"].limited(limits.get(name, self.max_train)) for name, parts in full.items()}
        names = [name for name in full if name != self.base]
        if self.balance is not Balance.none and names:
            rule = "min" if self.balance is Balance.min else f"cap={self.max_bytes}"
            sizes = balanced([train[name].bytes for name in names], rule)
            train |= {name: train[name].limited(size=size) for name, size in zip(names, sizes, strict=True)}
        validation = [parts["validation"].limited(most) for parts in full.values()]
        limited = [parts["test"].limited(self.max_test) for parts in full.values()]
        for split, kept in (("train", train.values()), ("validation", validation), ("test", limited)):
            self._drop("beyond the limits", *(parts[split] for parts in full.values()), kept=kept)
        test = limited
        if self.decontaminate:
            test = decontaminate(limited, [parts["train"] for parts in full.values()])
        self._drop("found in train", *limited, kept=test)
        for name, part in zip(full, test, strict=True):
            if not len(part) and part.num_contaminated:
                raise DataError(f"every piece of the test texts of domain {name} also occurs in train")
        return {
            name: Task(name, train[name], own, part, metric="perplexity")
            for name, own, part in zip(full, validation, test, strict=True)
        }

    def _ordering(self, trains: dict[str, Documents], reference: Documents | None) -> dict[str, Any]:
        """The order's record; domains are compared by a sample of all their train texts, whatever the limits."""
        found = order_domains(
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
        return found.record()

    def _reference(
        self, full: dict[str, dict[str, Documents]], there: list[str], data_dir: Path | None
    ) -> Documents | None:
        """The corpus that order=similar starts from: a domain, or a folder or file of text."""
        if self.reference is None:
            return None
        if self.reference in full:
            return full[self.reference]["train"]
        if self.reference in there:
            parts = self.split(self.reference, data_dir)
            self._drop("of the reference", *parts.values())
            return parts["train"]
        place = Path(self.reference).expanduser()
        if not place.exists():
            raise DataError(
                f"benchmark.reference={self.reference} is neither a domain of {self.name} nor a file or folder"
                f"{suggest(self.reference, there)}"
            )
        files = [place] if place.is_file() else text_files(place, self.report)
        found = Documents.of(*open_readers(files, "text", "doc_id", self.report))
        self._drop("of the reference", found)
        self.report.drop_bad_rows(self.skip_bad)
        return found

    def _groups(self, there: list[str], names: list[str]) -> dict[str, list[str]]:
        """The named groups, in training order; what is not in the sequence is left out."""
        for group, members in (self.groups or {}).items():
            for name in members:
                if name not in there:
                    raise DataError(f"benchmark.groups.{group} names {name}, which is no domain{suggest(name, there)}")
        groups = {group: [name for name in names if name in members] for group, members in self.sources().items()}
        return {group: members for group, members in groups.items() if members}


def _texts(documents: Documents) -> Iterator[str]:
    return (example.text for example in documents)


@dataclass
class TextDomains(Domains):
    """A sub-folder or file per domain: txt, jsonl or parquet.

    A folder with train, validation and test files (any of their usual names, or in parts: train-1, train-2) is
    split as they say; other files in it are not read. A folder that names no splits is one pool.
    Rows of a table are documents, or, where there is a column `document`, the pieces of one as long as it stays
    the same. A txt file is a document where there are several; a single or large one is a text without borders.
    """

    domains: list[str] = field(default_factory=list)
    text: str = "text"
    document: str = "doc_id"

    def names(self, data_dir: Path | None) -> list[str]:
        if data_dir is None:
            raise DataError(f"benchmark {self.name} is read from local files: set data_dir=FOLDER")
        place = self.data_root(data_dir)
        found = domain_files(place, self.report)
        if not found:
            raise DataError(
                f"{place} has no domains: a sub-folder or a file (txt, jsonl, parquet) for each is expected"
            )
        splits = sorted(SPLIT_NAMES.keys() & found)
        if splits:
            raise DataError(f"{place}: {', '.join(splits)} are splits, not domains: make a sub-folder for each domain")
        for name in self.domains:
            if name not in found:
                raise DataError(f"{place} has no domain {name}{suggest(name, found)}")
        return list(self.domains) or sorted(found)

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        assert data_dir is not None
        place = self.data_root(data_dir)
        files = named_splits(domain_files(place, self.report)[name], place, self.report)
        return {
            split: Documents.of(*open_readers(own, self.text, self.document, self.report))
            for split, own in files.items()
        }
