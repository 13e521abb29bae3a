"""Docstrings of the Python standard library: a labelled benchmark that needs no download."""

import ast
import hashlib
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from clpet.config.schema import require
from clpet.data.benchmark import Example, normalize
from clpet.data.sources.base import Source
from clpet.data.splits import Splits, by_label, split_off
from clpet.errors import DataError


@dataclass
class PythonStdlib(Source):
    """First paragraphs of the standard library's docstrings; the label is the module they document.

    The files of the running Python are parsed with `ast`, not imported. Their text differs a little between Python
    versions; the benchmark's fingerprint identifies the text behind a result.
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


def stdlib_docstrings(modules: list[str]) -> dict[str, list[str]]:
    """First paragraphs of the docstrings of standard-library modules, in an order that depends only on their text.

    A module is a top-level file or package. Modules such as `decimal`, whose Python source is in `_pydecimal`, are read
    from there. Paragraphs of fewer than four words, repeats, and texts that occur in two of the modules are left out.
    Raises DataError if the source of a module is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paragraphs = {module: _module_paragraphs(root, module) for module in modules}
    occurrences = Counter(key for texts in paragraphs.values() for key in texts)
    return {
        module: sorted((text for key, text in texts.items() if occurrences[key] == 1), key=_stable_key)
        for module, texts in paragraphs.items()
    }


def _stable_key(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


@cache  # the runs of a sweep share one process
def _module_paragraphs(root: Path, module: str) -> dict[str, str]:
    candidates = [root / module, root / f"_py{module}.py", root / f"{module}.py"]
    source = next((path for path in candidates if path.exists()), None)
    if source is None:
        raise DataError(f"the standard library at {root} has no source of the module {module}")
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    paragraphs: dict[str, str] = {}
    for file in files:
        if {"test", "tests"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").strip().split("\n\n")[0].split()
                if len(first) >= 4:
                    paragraphs.setdefault(normalize(" ".join(first)), " ".join(first))
    return paragraphs
