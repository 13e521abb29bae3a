"""Finished runs side by side: groups of those that differ in their seed only, named by what tells them apart."""

from pathlib import Path
from typing import Any

from clpet.config import NOT_IDENTITY
from clpet.errors import ConfigError
from clpet.reading import read_json


def lookup(run: dict[str, Any], path: Path, key: str) -> str:
    """The value of a key: of the results, else of the run's recorded config; of several with commas, all of them."""
    if "," in key:
        return ", ".join(lookup(run, path, part) for part in key.split(","))
    if key in ("method", "model", "benchmark", "replay", "peft", "seed"):
        return str(run[key])
    node: Any = read_json(path / "run.json").get("config")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            raise ConfigError(f"{path} has no key {key} in its configuration")
        node = node[part]
    return str(node)


Group = list[tuple[Path, dict[str, Any]]]


def group_by(runs: Group, key: str) -> dict[str, Group]:
    """Runs by the value of a key. Runs of one value that differ in more than their seed become several groups."""
    alike: dict[str, dict[str, Group]] = {}
    for path, run in runs:
        value = lookup(run, path, key) + (" (task given)" if run["task_id_at_test"] else "")
        alike.setdefault(value, {}).setdefault(run["signature"], []).append((path, run))
    groups: dict[str, Group] = {}
    for value, found in alike.items():
        names = apart(list(found.values())) if len(found) > 1 else [""]
        groups |= {
            f"{value} ({name})" if name else value: group for name, group in zip(names, found.values(), strict=True)
        }
    return groups


def apart(groups: list[Group]) -> list[str]:
    """What tells groups of runs apart: the knobs in which they differ, up to three, else their signatures."""
    knobs = [flat(read_json(group[0][0] / "run.json").get("config")) for group in groups]
    keys = dict.fromkeys(key for own in knobs for key in own if key.partition(".")[0] not in NOT_IDENTITY)
    differ = [key for key in keys if len({own.get(key) for own in knobs}) > 1]
    found = [", ".join(f"{key}={own.get(key)}" for key in differ) for own in knobs]
    fits = 0 < len(differ) <= 3 and len(set(found)) == len(groups)
    return found if fits else [group[0][1]["signature"] for group in groups]


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value} of a configuration."""
    if not isinstance(node, dict):
        return {prefix: str(node)}
    inner = (flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in inner for key, value in part.items()}
