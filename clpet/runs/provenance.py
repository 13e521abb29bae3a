"""Fingerprints of a run's inputs: local weights, local data and the code of the user's own classes.

The name of a run directory depends on the configuration alone, so it cannot show that the files behind a configured
path have changed. These fingerprints do; they are stored in run.json, results.json and every checkpoint.
"""

import ast
import contextlib
import hashlib
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from clpet import __version__
from clpet.config.build import build
from clpet.config.compose import plugin_dirs
from clpet.config.identity import digest
from clpet.config.schema import OBJECT_GROUPS, Config
from clpet.data.benchmark import Benchmark
from clpet.data.chat_template import file_fingerprint
from clpet.data.sources.base import Source
from clpet.errors import ClpetError, ConfigError
from clpet.methods.base import Method
from clpet.models.backbone import Backbone
from clpet.objectives import load
from clpet.records import Results
from clpet.runtime.fingerprint import cached_value, file_stat, hub_commit

log = logging.getLogger(__name__)


def inputs(config: Config, backbone: Backbone, method: Method) -> dict[str, str]:
    """{name: fingerprint} of a run's weights and code; inputs that cannot change without a new version have none."""
    targets = [str(getattr(config, group)["_target_"]) for group in OBJECT_GROUPS]
    fingerprints = {"weights": backbone.fingerprint(config.cache_dir), "code": code(targets), **method.inputs()}
    if config.benchmark.get("chat"):
        fingerprints["chat_template"] = file_fingerprint(backbone)
    return {name: value for name, value in fingerprints.items() if value}


def load_benchmark(config: Config, source: Source) -> Benchmark:
    """Loads the benchmark and caches its fingerprint: `check_finished` then need not read the data again."""
    key = data_key(config, source)
    benchmark = source.load(config.data_dir)
    cached_value(config.cache_dir, key, benchmark.fingerprint)
    return benchmark


def check_finished(out: Path, results: Results, config: Config) -> None:
    """Raises ConfigError if the weights, data or code have changed since the run finished.

    Inputs that no longer exist cannot be compared and only give a warning.
    """
    recorded: dict[str, str] = {"data": results["data"]["fingerprint"], **results.get("inputs", {})}
    try:
        method = build(config.method, "method", cache_dir=config.cache_dir)
        now = inputs(config, build(config.model, "model"), method)
        now["data"] = data_now(config, recorded["data"])
    except ClpetError as error:
        log.warning("%s: cannot check whether its inputs have changed since: %s", out, error)
        return
    for name, value in recorded.items():
        if now.get(name, value) != value:
            more = "; new tasks alone are learned with tasks=[old, ..., new]" if name == "data" else ""
            raise ConfigError(
                f"{out} was finished with {name} {value}, now it is {now[name]}: run it again with fresh=true, "
                f"or print its results with clpet show {out}{more}"
            )


def data_now(config: Config, recorded: str) -> str:
    """The current fingerprint of the data; data from the hub are assumed to be unchanged, without loading them."""
    _, source = load(config, config.cache_dir)
    if config.data_dir is None and (getattr(source, "hub", None) or getattr(source, "hub_tasks", None)):
        return recorded
    return cached_value(config.cache_dir, data_key(config, source), lambda: source.load(config.data_dir).fingerprint())


def data_key(config: Config, source: Source) -> str | None:
    """Cache key of a benchmark's fingerprint: its settings, and size and times of all its files.

    None if a file has changed within the last seconds: its time stamps cannot be trusted yet.
    """
    if config.data_dir is None:  # the data come from the Python installation
        return digest([config.benchmark, config.objective, __version__, sys.version], 32)
    folder = Path(config.data_dir).expanduser()
    stats = [file_stat(path) for path in sorted(_walk(source.data_root(folder) if folder.is_dir() else folder))]
    return None if None in stats else digest([config.benchmark, config.objective, __version__, stats], 32)


def _walk(path: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder; hidden ones are skipped."""
    if not path.is_dir():
        yield path
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # os.walk descends into these only
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def hub_data(benchmark: Mapping[str, Any]) -> dict[str, str]:
    """{dataset: commit} of the hub datasets in a benchmark's settings; datasets not in the local cache are left out."""
    nodes = [benchmark, *(benchmark.get("hub_tasks") or {}).values()]
    revisions = {str(node["hub"]): node.get("hub_revision") for node in nodes if node.get("hub")}
    commits = {name: hub_commit(name, revision, "dataset") for name, revision in revisions.items()}
    return {name: commit for name, commit in commits.items() if commit}


def code(targets: Iterable[str]) -> str | None:
    """Hash of the --config-dir modules that define the classes `targets`, and of all modules they import from there.

    None if all classes are clpet's own. Imports are followed without running the code.
    """
    hashes: dict[str, str] = {}
    queue = [target.rpartition(".")[0] for target in targets]
    while queue:
        name = queue.pop()
        if name.partition(".")[0] == "clpet" or name in hashes or (path := _module(name)) is None:
            continue
        source = path.read_bytes()
        hashes[name] = hashlib.sha256(source).hexdigest()
        # Importing a module also runs the __init__.py of the packages that contain it.
        queue += [name.rpartition(".")[0], *_imported(source, name, path.name == "__init__.py")]
    return digest(sorted(hashes.items()), 32) if hashes else None


def _module(name: str) -> Path | None:
    """The file of a module in a --config-dir; None if there is none."""
    for folder in plugin_dirs() if name else ():
        stem = folder.joinpath(*name.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imported(source: bytes, name: str, package: bool) -> Iterator[str]:
    """Dotted names that may be modules in the import statements of a source file, also inside functions.

    In `from a import b`, b may be a module or a name inside a: both a and a.b are given. Relative imports are resolved
    against `name`, the module's own dotted name; `package` says whether it is an __init__.py.
    """
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                components = name.split(".")
                parents = components[: len(components) - node.level + package] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                yield from (base, *(f"{base}.{alias.name}" if base else alias.name for alias in node.names))


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "hydra-core", "omegaconf", "numpy", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python, clpet and the packages that results depend on."""
    result = {"python": platform.python_version(), "clpet": __version__, "platform": platform.platform()}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "absent"
    return result


def git_revision() -> str | None:
    """Commit of the git checkout that clpet runs from, with + if it has uncommitted changes; None if installed."""
    package = Path(sys.modules["clpet"].__file__ or "").resolve().parent

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed package may be inside someone else's checkout: only a tracked run.py proves that it is this one.
    tracked = git("ls-files", "--error-unmatch", "run.py")
    revision = git("rev-parse", "HEAD") if tracked else None
    return revision and revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
