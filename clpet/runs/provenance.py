"""Fingerprints of what a run reads: local weights, local data and the code of one's own classes.

A run directory's name is a function of the configuration. Whether the files behind a configured path are still the
same ones is told by these fingerprints, which run.json, results.json and every checkpoint hold.
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
from clpet.errors import ClpetError, ConfigError
from clpet.runtime.fingerprint import cached_value, file_stat, hub_commit

log = logging.getLogger(__name__)


def inputs(config: Config, backbone: Any, method: Any) -> dict[str, str]:
    """Fingerprints of a run's weights and code, by name; what cannot change behind its name has none."""
    targets = [str(getattr(config, group)["_target_"]) for group in OBJECT_GROUPS]
    found = {"weights": backbone.fingerprint(config.cache_dir), "code": code(targets), **method.inputs()}
    return {name: value for name, value in found.items() if value}


def load(config: Config, source: Any) -> Any:
    """The benchmark of a source; its fingerprint is remembered, so that a later look need not read the files."""
    key = data_key(config, source)
    benchmark = source.load(config.data_dir)
    cached_value(config.cache_dir, key, benchmark.fingerprint)
    return benchmark


def check_finished(out: Path, results: dict[str, Any], config: Config) -> None:
    """Raises ConfigError where a finished run's weights, data or code are others by now.

    What cannot be compared, because it is not there any more, is warned of.
    """
    recorded: dict[str, str] = {"data": results["data"]["fingerprint"], **results.get("inputs", {})}
    try:
        method = build(config.method, "method", cache_dir=config.cache_dir)
        now = inputs(config, build(config.model, "model"), method)
        now["data"] = _data_now(config, recorded["data"])
    except ClpetError as error:
        log.warning("%s: what it was made of cannot be compared with what is there now: %s", out, error)
        return
    for name, value in recorded.items():
        if now.get(name, value) != value:
            raise ConfigError(
                f"{out} was finished with {name} {value}, now it is {now[name]}: fresh=true runs it again; "
                f"clpet show {out} prints the results it had"
            )


def _data_now(config: Config, recorded: str) -> str:
    """The fingerprint of the data as they are now; data from the hub are taken to be the recorded ones."""
    source = build(config.benchmark, "benchmark", cache_dir=config.cache_dir)
    if config.data_dir is None and (getattr(source, "hub", None) or getattr(source, "hub_tasks", None)):
        return recorded
    return cached_value(config.cache_dir, data_key(config, source), lambda: source.load(config.data_dir).fingerprint())


def data_key(config: Config, source: Any) -> str | None:
    """What the fingerprint of a benchmark is remembered by: its settings, and size and times of all its files.

    None where a file has changed just now.
    """
    if config.data_dir is None:
        return digest([config.benchmark, __version__, sys.version], 32)
    place = Path(config.data_dir).expanduser()
    stats = [file_stat(path) for path in sorted(_walk(source.place(place) if place.is_dir() else place))]
    return None if None in stats else digest([config.benchmark, __version__, stats], 32)


def _walk(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
    for folder, inner, names in os.walk(place):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def hub_data(benchmark: Mapping[str, Any]) -> dict[str, str]:
    """{data set: commit} of what a benchmark's settings name of the hub, as far as it lies in this machine's cache."""
    named = [benchmark, *(benchmark.get("hub_tasks") or {}).values()]
    pairs = {str(node["hub"]): node.get("hub_revision") for node in named if node.get("hub")}
    found = {name: hub_commit(name, revision, "dataset") for name, revision in pairs.items()}
    return {name: commit for name, commit in found.items() if commit}


def code(targets: Iterable[str]) -> str | None:
    """Hash of the --config-dir modules that hold the classes `targets`, and of those that they import from there."""
    found: dict[str, str] = {}
    waiting = [target.rpartition(".")[0] for target in targets]
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] == "clpet" or name in found or (path := _module(name)) is None:
            continue
        source = path.read_bytes()
        found[name] = hashlib.sha256(source).hexdigest()
        waiting += [name.rpartition(".")[0], *_imported(source, name, path.name == "__init__.py")]
    return digest(sorted(found.items()), 32) if found else None


def _module(name: str) -> Path | None:
    """The file of a module in a --config-dir."""
    for folder in plugin_dirs() if name else ():
        place = folder.joinpath(*name.split("."))
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imported(source: bytes, name: str, package: bool) -> Iterator[str]:
    """The modules that a module's imports may name, inside functions too."""
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = name.split(".")
                above = parts[: len(parts) - node.level + package] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from (base, *(f"{base}.{alias.name}" if base else alias.name for alias in node.names))


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "hydra-core", "omegaconf", "numpy", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python, clpet and the packages that results depend on."""
    found = {"python": platform.python_version(), "clpet": __version__, "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_revision() -> str | None:
    """Revision of the checkout clpet runs from, with + when it has changes; None outside a checkout."""
    here = Path(sys.modules["clpet"].__file__ or "").resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", "run.py")
    revision = git("rev-parse", "HEAD") if tracked else None
    return revision and revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
