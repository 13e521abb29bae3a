"""A finished run to open, and helpers to damage its files and to read refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli, tiny_args


@pytest.fixture(scope="session")
def finished(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sequential run on the words benchmark with a snapshot after every second task; read only."""
    out = tmp_path_factory.mktemp("runs")
    assert run_cli("train", "method=sequential", *tiny_args(words), "train.snapshot_every=2", f"output_dir={out}") == 0
    (folder,) = out.glob("*/*/s*")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def only(pattern: str = "outputs/*/*/s*") -> Path:
    """The only folder that matches a pattern."""
    (folder,) = Path().glob(pattern)
    return folder


def edit(run: Path, change: Callable[[dict[str, Any]], object], name: str = "run.json") -> None:
    """Applies `change` to the contents of a JSON file in a run directory."""
    value = json.loads((run / name).read_text())
    change(value)
    (run / name).write_text(json.dumps(value))


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets a nested value."""

    def change(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def refused(answer: Any) -> bool:
    """Whether a command ended with exit code 2 and one line of error, and without a traceback."""
    one_line = answer.err.count("\n") == 1
    return answer.code == 2 and one_line and "Traceback" not in answer.err and "internal" not in answer.err
