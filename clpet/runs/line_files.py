"""The files of a run that grow line by line: metrics.jsonl (evaluations) and steps.jsonl (optimiser steps)."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from clpet.records import Json, ProgressLine
from clpet.reporting.step_lines import STEP_LOG, StepLine
from clpet.runtime.atomic_io import write_text
from clpet.runtime.json_lines import parse_line, parse_lines
from clpet.runtime.run_checkpoint import RunState

METRICS = "metrics.jsonl"


def append(path: Path, lines: Sequence[Mapping[str, Json] | StepLine]) -> None:
    """Appends one line of JSON per value."""
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> list[Json]:
    """The lines of a file in order; none if it does not exist. Invalid lines are left out."""
    if not path.exists():
        return []
    values = [value for _, value in parse_lines(path.read_text("utf-8"))]
    return [value for value in values if not isinstance(value, ValueError)]


def drop_repeated(out: Path, state: RunState | None) -> None:
    """Removes the lines that a run resumed at `state` will write again; all lines if it starts from nothing."""
    _filter(out / METRICS, lambda line: state is not None and cast(ProgressLine, line)["done"] <= state.done)
    steps, validated = state.steps() if state else (-1, False)

    def is_before(line: Json) -> bool:
        step_line = cast(StepLine, line)
        # A checkpoint at the end of an epoch is written before the epoch is validated, one of a finished fit after it.
        limit = steps - 1 if "validation" in step_line and not validated else steps
        return step_line["step"] <= limit

    _filter(out / STEP_LOG, is_before)


def _filter(path: Path, remains: Callable[[Json], bool]) -> None:
    """Rewrites a file with the lines for which `remains` is true; a truncated line is dropped."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if _holds(line, remains)]
        write_text(path, "".join(f"{line}\n" for line in lines))


def _holds(line: str, condition: Callable[[Json], bool]) -> bool:
    try:
        return condition(parse_line(line))
    except (ValueError, KeyError, TypeError):
        return False
