"""scripts/gpu_check.py with tiny shapes: on a CPU, and without a model hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


def check(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Runs the script; the process and its report."""
    command = [sys.executable, str(SCRIPT), "--out", str(folder / "report"), *words]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    report = folder / "report.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.slow
def test_all_parts_of_the_gpu_check_run_with_tiny_shapes(tmp_path: Path) -> None:
    done, report = check(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("lora", "full", "methods", "generate", "tests"), "done"
    )
    contenders = [row["contender"] for row in report["parts"]["methods"]["rows"]]
    assert contenders == ["by hand", "sequential", "kif", "dynamic_conpet"]
    assert "| clpet, eager |" in (tmp_path / "report.md").read_text()
