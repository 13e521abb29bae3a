"""Reads JSON files of run directories as untrusted input, since anyone may have edited them. Does not import torch."""

import contextlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TypeAlias, cast

from clpet.errors import ClpetError, DataError
from clpet.escape import inline
from clpet.records import Description, Json, Results, Rows

log = logging.getLogger(__name__)

MAX_DEPTH = 32  # levels of nesting; deeper values could exhaust the stack of recursive code
MAX_DIGITS = 19  # of an integer; NumPy and Arrow use 64 bits
NUMBER = int | float
# A type, [schema of each item], or {key: schema}; the key `str` stands for any key.
Schema: TypeAlias = type | UnionType | list["Schema"] | Mapping[str | type[str], "Schema"]
MATRIX: Schema = [[NUMBER | None]]
# Schema of results.json.
RESULTS: dict[str | type[str], Schema] = {
    **dict.fromkeys(("method", "model", "benchmark", "replay", "peft", "signature", "setting", "direction"), str),
    **dict.fromkeys(("scores", "correct", "total", "backward", "task_scores", "task_forward"), MATRIX),
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
# Keys that runs of older versions lack.
OPTIONAL: dict[str | type[str], Schema] = {
    **dict.fromkeys(("objective", "metric", "split"), str),
    "softmax": str | None,
    "data": {"fingerprint": str},
    "resolved": dict,
    "extended_from": {"run": str, "tasks": [str], "state": str, "copied_rows": [int]},
    **{name: {str: str} for name in ("test_sets", "inputs")},
    "validation": {str: NUMBER | None},
    "task_metrics": {str: NUMBER | None},
}


def read_json(path: Path) -> dict[str, Json]:
    """Reads a JSON object. Raises DataError if the file is missing or invalid, or contains NaN or an infinity."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not contain a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise DataError(f"{path} is nested too deeply")
    return value


def read_results(path: Path) -> Results:
    """Reads results.json and checks the type and size of every value that is used later. Raises DataError."""
    values = read_json(path)
    check_schema(values, {**RESULTS, **{name: item for name, item in OPTIONAL.items() if name in values}}, str(path))
    run = cast(Results, values)
    tasks, costs = run["tasks"], run["cost"]
    if not tasks or len(set(tasks)) < len(tasks) or run["direction"] not in ("higher", "lower"):
        raise DataError(f"{path} needs tasks with distinct names and a direction that is 'higher' or 'lower'")
    matrices = {name: cast(Rows, values[str(name)]) for name, schema in RESULTS.items() if schema is MATRIX}
    for name, rows in matrices.items():
        if [len(row) for row in rows] != [len(tasks)] * (len(tasks) + 1):
            raise DataError(f"{path}: {name} is not a matrix of {len(tasks) + 1} rows and {len(tasks)} columns")
    if not run["diagnostics"] or len(costs) > len(tasks):
        raise DataError(f"{path}: diagnostics are missing, or there are more costs than tasks")
    return run


def find_runs(folder: Path) -> list[tuple[Path, Results]]:
    """Returns (folder, results) of every finished run below a folder, by path; skips invalid ones with a warning."""
    runs = []
    for path in sorted(folder.glob("*/*/s*-*/results.json")):
        try:
            runs.append((path.parent, read_results(path)))
        except (DataError, OSError) as error:
            log.warning("%s", inline(f"skipped: {error}"))
    return runs


def check_schema(value: Json, schema: Schema, where: str) -> None:
    """Raises DataError where a value does not match a schema (see RESULTS)."""
    if isinstance(schema, type | UnionType):
        if not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
            name = getattr(schema, "__name__", schema)
            raise DataError(f"{where}: {str(value)[:40]!r} is not of the type {name}")
    elif isinstance(schema, list):
        check_schema(value, list, where)
        for item in cast(list[Json], value):
            check_schema(item, schema[0], where)
    else:
        check_schema(value, dict, where)
        assert isinstance(value, dict)
        for key, inner in schema.items():
            if key is not str and key not in value:
                raise DataError(f"{where} has no {key}")
            for name in value if key is str else (str(key),):
                check_schema(value[name], inner, f"{where}: {name}")


@contextlib.contextmanager
def as_data_error(message: str) -> Iterator[None]:
    """Raises DataError with `message` for any other error that inconsistent file contents cause in the block.

    With CLPET_DEBUG set the original error is raised.
    """
    try:
        yield
    except (ClpetError, OSError):
        raise
    except Exception as error:  # libraries raise errors of no common type for unexpected values
        if os.environ.get("CLPET_DEBUG"):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{message}: {type(error).__name__}: {text[:200]}") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _bounded(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:MAX_DIGITS]}... is too large")
    return int(text)


def _depth(value: Json) -> int:
    """Levels of nesting, counted without recursion."""
    level: list[Json] = [value]
    depth = 0
    while level:
        level = [child for node in level for child in _children(node)]
        depth += 1
    return depth


def _children(node: Json) -> list[Json]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def split_of(run: Description) -> str:
    """Returns the split on which a run's matrix was measured; runs of older versions always used test."""
    return run.get("split", "test")


def command(results: Description, method: str) -> str:
    """Returns the command that runs another method under the settings of a run."""
    overrides = [
        override for override in results["overrides"] if not override.startswith(("method", "replay", "fresh", "hydra"))
    ]
    return train_command(results, [f"method={method}", *overrides])


def train_command(results: Description, overrides: Sequence[str]) -> str:
    """`clpet train` with these overrides and the --config-dir of a run, quoted for a shell."""
    flags = [word for folder in results.get("config_dirs") or () for word in ("--config-dir", str(folder))]
    return f"clpet train {shlex.join([*flags, *overrides])}"
