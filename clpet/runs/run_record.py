"""Reads run.json as data from an untrusted source, and imports no torch.

Its classes must be clpet's own, interpolations such as ${oc.env:HOME}, which could read the environment, are rejected,
and paths in it are never written to.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from clpet.config.build import option_names
from clpet.config.renamed import translate_keys
from clpet.errors import ConfigError, DataError
from clpet.records import Json
from clpet.runtime.untrusted_json import Schema, check_schema, read_json

TASK_NAME = re.compile(r"[^\x00-\x1f]+")
FOLDER_OPTIONS = ("benchmark.tasks", "benchmark.folders", "benchmark.domains")  # names that may be joined to data_dir
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_run_json(out: Path, plugins: bool = False) -> dict[str, Any]:
    """The checked contents of run.json, options under their present names. Raises ConfigError and DataError.

    `plugins` allows the classes of a --config-dir and a model's remote code.
    """
    file = out / "run.json"
    if not file.is_file():
        raise DataError(f"{out} is not a run directory: it has no run.json")
    run_json = cast(dict[str, Any], read_json(file))
    shape: dict[str | type[str], Schema] = {"config": dict, "tasks": [str], "data": {"fingerprint": str}}
    check_schema(run_json, {**shape, **({"inputs": {str: str}} if "inputs" in run_json else {})}, f"{file}")
    check_config(run_json["config"], plugins, "")
    # After check_config: a class is only imported if plugins are allowed.
    translate_keys(run_json["config"], option_names)
    for name in run_json["tasks"]:
        if not TASK_NAME.fullmatch(name):
            raise ConfigError(f"{file}: invalid task name {name!r}")
    return run_json


def cache_dir(out: Path) -> str | None:
    """The cache next to the run's output folder, if there is one: the recorded cache_dir may be any path."""
    output_dir = out.resolve().parents[2:3]
    return next((str(folder / ".cache") for folder in output_dir if (folder / ".cache").is_dir()), None)


def check_config(node: Json, plugins: bool, where: str) -> None:
    """Raises ConfigError for unsafe values in a recorded config; without `plugins` also switches remote code off."""
    if isinstance(node, dict):
        if not plugins and "trust_remote_code" in node:
            node["trust_remote_code"] = False
        for key, value in node.items():
            check_config(value, plugins, f"{where}.{key}".lstrip("."))
        _check_names(node, plugins, where)
    elif isinstance(node, list):
        for item in node:
            check_config(item, plugins, where)
            if where in FOLDER_OPTIONS and not is_relative_name(str(item)):
                raise ConfigError(f"{where}: {item!r} does not name a folder below data_dir")
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(f"{where} contains ${{...}}: a recorded configuration must be resolved")


def _check_names(node: Mapping[str, Json], plugins: bool, where: str) -> None:
    """Raises ConfigError where a node names a hub repository, an encoder or a class that must not be loaded."""
    for key in ("encoder", "order_encoder"):  # a name, a hub id or a folder
        if ".." in str(node.get(key)).split("/"):
            raise ConfigError(f"{where}.{key}: {str(node[key])[:80]!r} is not a name, a hub id or an absolute path")
    hub, target = node.get("hub"), node.get("_target_", "clpet.")
    if hub is not None and not (isinstance(hub, str) and HUB_ID.fullmatch(hub)):
        raise ConfigError(f"{where}.hub: {str(hub)[:80]!r} is not a hub id")
    # Old names such as clpet.memory.DynamicReplay pass here; find_class translates them.
    if not (isinstance(target, str) and (plugins or re.fullmatch(r"clpet\.[\w.]*", target))):
        hint = "if you trust this run, allow your own classes with --allow-plugins and --config-dir FOLDER"
        raise ConfigError(f"{where}._target_ names {str(target)[:80]}, which is not part of clpet: {hint}")


def is_relative_name(name: str) -> bool:
    """Whether a recorded name, joined to a folder, stays inside that folder."""
    return bool(TASK_NAME.fullmatch(name)) and not Path(name).is_absolute() and ".." not in re.split(r"[/\\]", name)
