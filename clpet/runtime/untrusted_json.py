"""Run directories read back as what they may be: files that anyone has written. Imports no torch."""

import contextlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from clpet.errors import ClpetError, DataError
from clpet.escape import inline

log = logging.getLogger(__name__)

DEEPEST = 32  # levels of nesting
NUMBER = int | float
ROWS = [[NUMBER | None]]
# What is read of results.json: a type, [shape of each item], or {key: shape}; the key str stands for any.
RESULTS = {
    **dict.fromkeys(("method", "model", "benchmark", "replay", "peft", "signature", "setting", "direction"), str),
    **dict.fromkeys(("scores", "correct", "total", "backward", "task_scores", "task_forward"), ROWS),
    **dict.fromkeys(("average", "whole", "backward_transfer", "forgetting", "learning_accuracy"), NUMBER | None),
    "seed": int,
    "task_id_at_test": bool,
    "tasks": [str],
    "overrides": [str],
    "parameters": {"trainable": int, "total": int, "percent": NUMBER},
    "diagnostics": [{str: NUMBER | None}],
    "cost": [
        dict.fromkeys(
            ("seconds", "forward_examples", "backward_examples", "forward_tokens", "peak_memory_mb",
             "trainable_parameters", "stored_parameters", "replay_examples"), NUMBER,
        )
    ],
}  # fmt: skip
# What runs of older versions do not have.
OPTIONAL = {
    **dict.fromkeys(("objective", "metric", "split"), str),
    "softmax": str | None,
    "data": {"fingerprint": str},
    "resolved": dict,
    **{name: {str: str} for name in ("test_sets", "inputs")},
    "validation": {str: NUMBER | None},
    "task_metrics": {str: NUMBER | None},
}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises DataError for what is no file or no JSON, NaN and Infinity among it."""
    if not path.is_file():
        raise DataError(f"{path} is not there")
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no object")
    if _depth(value) > DEEPEST:
        raise DataError(f"{path} is nested too deeply")
    return value


def read_results(path: Path) -> dict[str, Any]:
    """results.json, of which every part that is read later has its type and size. Raises DataError."""
    run = read_json(path)
    check(run, {**RESULTS, **{name: shape for name, shape in OPTIONAL.items() if name in run}}, str(path))
    tasks, costs = run["tasks"], run["cost"]
    if not tasks or len(set(tasks)) < len(tasks) or run["direction"] not in ("higher", "lower"):
        raise DataError(f"{path}: there are no tasks, or one twice, or the direction is neither higher nor lower")
    for name, shape in RESULTS.items():
        if shape is ROWS and [len(row) for row in run[name]] != [len(tasks)] * (len(tasks) + 1):
            raise DataError(f"{path}: {name} is no matrix of {len(tasks) + 1} rows and {len(tasks)} columns")
    if not run["diagnostics"] or len(costs) > len(tasks):
        raise DataError(f"{path}: diagnostics are missing, or there are more costs than tasks")
    return run


def find_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, results) of every finished run below a folder, by path. A damaged one is named and left out."""
    found = []
    for path in sorted(folder.glob("*/*/s*-*/results.json")):
        try:
            found.append((path.parent, read_results(path)))
        except (DataError, OSError) as error:
            log.warning("%s", inline(f"left out: {error}"))
    return found


def check(value: Any, shape: Any, where: str) -> None:
    """Raises DataError where a value does not have a shape (see RESULTS)."""
    if isinstance(shape, type | UnionType):
        if not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
            raise DataError(f"{where}: {str(value)[:40]!r} is not of the type {getattr(shape, '__name__', shape)}")
    elif isinstance(shape, list):
        check(value, list, where)
        for item in value:
            check(item, shape[0], where)
    else:
        check(value, dict, where)
        for key, inner in shape.items():
            if key is not str and key not in value:
                raise DataError(f"{where} has no {key}")
            for name in value if key is str else (key,):
                check(value[name], inner, f"{where}: {name}")


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Raises DataError, which says `what`, for whatever else can come of contents that do not fit together."""
    try:
        yield
    except (ClpetError, OSError):
        raise
    except Exception as error:  # what libraries raise for values they do not expect has no common type
        if os.environ.get("CLPET_DEBUG"):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{what}: {type(error).__name__}: {text[:200]}") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"{text[:19]}... is too large")
    return int(text)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level = [inner for node in level for inner in _inner(node)]
        depth += 1
    return depth


def _inner(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def split_of(run: dict[str, Any]) -> str:
    """The part of the data that a run's matrix was measured on."""
    return run.get("split", "test")


def command(results: dict[str, Any], method: str) -> str:
    """The command that runs another method in the setting of a run."""
    kept = [word for word in results["overrides"] if not word.startswith(("method", "replay", "fresh", "hydra"))]
    return f"clpet train {shlex.join([f'method={method}', *kept])}"
