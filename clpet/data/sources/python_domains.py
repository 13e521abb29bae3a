"""The standard library of the running Python as domains of text: real English and code without a download."""

import ast
import logging
import sysconfig
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from clpet.config.schema import require
from clpet.data.document_readers import Reader, Strings, TextFiles
from clpet.data.documents import Documents
from clpet.data.sources.text_domains import Domains
from clpet.errors import DataError

log = logging.getLogger(__name__)

TOPICS = "pydoc_data.topics"  # the language reference, which `help()` shows
REST = "*"  # every module that no domain lists
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass
class PythonDomains(Domains):
    """Groups of modules, one document per source file; for `pydoc_data.topics`, one per topic.

    Modules that this Python lacks are skipped, and a domain of less than `min_bytes` is merged into the smallest other
    one. Files are split by their hash. The text differs a little between Python versions, so the version is stored with
    every result.
    """

    modules: dict[str, list[str]] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    min_bytes: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.min_bytes >= 1, "benchmark.min_bytes", self.min_bytes, "at least 1")
        listed = [module for group in self.modules.values() for module in group]
        repeated = sorted({module for module in listed if listed.count(module) > 1})
        require(not repeated, "benchmark.modules", f"{', '.join(repeated)} twice", "in one domain each")

    def names(self, data_dir: Path | None) -> list[str]:
        return list(self.files)

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        paths = self.files[name]
        topics = [path for path in paths if path == library() / "pydoc_data" / "topics.py"]
        readers: list[Reader] = [Strings(read_topics(path), self.report) for path in topics]
        sources = [path for path in paths if path not in topics]
        return {"train": Documents.of(*readers, *([TextFiles(sources, self.report)] if sources else []))}

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """{domain: its files}, small ones merged. Raises DataError if the source of the library is not installed."""
        modules = library_modules(library(), self.exclude)
        listed = {module for group in self.modules.values() for module in group}
        files = {}
        for name, group in self.modules.items():
            members = [module for module in modules if module in group or (REST in group and module not in listed)]
            files[name] = sorted(path for module in members for path in modules[module])
        sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
        while len(sizes) > 1 and min(sizes.values()) < self.min_bytes:
            small = min(sizes, key=lambda name: sizes[name])
            into = min((name for name in sizes if name not in (small, self.base)), key=lambda name: sizes[name])
            log.warning("domain %s has only %d bytes and is merged into %s", small, sizes[small], into)
            files[into] = sorted(files[into] + files.pop(small))
            sizes[into] += sizes.pop(small)
        return files


def library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_modules(root: Path, exclude: list[str]) -> dict[str, list[Path]]:
    """{module or package: its files}, without tests and installed packages; the language reference is a module."""
    modules: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = TOPICS if parts == tuple(TOPICS.split(".")) else parts[0]
        if not NOT_LIBRARY.intersection(parts) and not any(fnmatch(module, pattern) for pattern in exclude):
            modules.setdefault(module, []).append(path)
    if not modules:
        raise DataError(f"the source of the standard library is not installed at {root}")
    return modules


def read_topics(path: Path) -> list[str]:
    """The texts of pydoc's dictionary of topics, parsed without importing it."""
    for node in ast.parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            return [str(text) for text in ast.literal_eval(value).values()]
    raise DataError(f"{path} contains no dictionary of topics")
