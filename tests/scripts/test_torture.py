"""A few rounds of scripts/torture.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "torture.py"


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_like_uninterrupted_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "4", "--seed", "1", "--folder", str(tmp_path / "torture")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 of 4 rounds equal" in done.stdout
    assert int(re.search(r"(\d+) resumes inside a task", done.stdout)[1]) > 0
