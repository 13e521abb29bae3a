"""scripts/gpu_check.py with tiny shapes: on a CPU, and without a model hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

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
    assert "| clpet, compiled |" in (tmp_path / "report.md").read_text()


def test_flops_of_a_token_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention computes all pairs of positions, of which the formula counts the causal half."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_parts import TINY_SIZES, flops_per_token

    config, length = dict(TINY_SIZES["lora"].config), 32
    values = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(values, attn_implementation="eager")
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    without_attention = flops_per_token(config, 0, None)
    attention = flops_per_token(config, length, None) - without_attention
    assert counter.get_total_flops() == length * (without_attention + 2 * attention)
    assert without_attention == 6 * (2 * 36_864 + 64 * 300)
    assert flops_per_token(config, 0, 16) == 4 * (2 * 36_864 + 64 * 300) + 6 * 2 * 16 * 1_024
