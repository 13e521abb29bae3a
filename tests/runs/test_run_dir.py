"""The files that a run writes, read with their formats' own libraries."""

import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from clpet.runs.run_dir import _warn_of_rounding
from clpet.runtime.hardware import Device, Hardware
from tests.conftest import rendering, run_cli, tiny_args
from tests.wandb_reader import read_wandb


@pytest.fixture(scope="module")
def finished(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dynamic_conpet run with offline wandb; read only."""
    out = tmp_path_factory.mktemp("finished")
    with rendering():
        assert run_cli("train", *tiny_args(words), "tracking=offline", f"output_dir={out}") == 0
    (folder,) = out.glob("*/*/s*")
    return folder


def test_the_run_directory_contains_all_files(finished: Path) -> None:
    for name in (".hydra/config.yaml", "train.log", "run.json", "metrics.jsonl", "results.json", "transfer.csv",
                 "transfer.png", "accuracy.png", "loss.png", "steps.jsonl", "adapters", "heads", "predictions", "state", "wandb"):  # fmt: skip
        assert (finished / name).exists(), name
    assert (finished / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_names_options_that_round_differently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In both directions: an option that is off is not recorded."""
    one, other = Hardware(device=Device.cpu), Hardware(device=Device.cpu, padding_free=True, max_tokens=64)
    for before, now in ((one, other), (other, one), (other, other)):
        (tmp_path / "run.json").write_text(json.dumps({"host": before.record()}))
        _warn_of_rounding(tmp_path, now.record())
    changes = ["padding_free false, now true, max_tokens unlimited, now 64",
               "padding_free true, now false, max_tokens 64, now unlimited"]  # fmt: skip
    assert caplog.messages == [
        f"the run began with {change}: it ends equal to rounding, not bit for bit" for change in changes
    ]


def test_results_json_has_the_documented_keys(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for key in ("method", "model", "benchmark", "seed", "signature", "batch", "tasks", "direction", "scores", "backward", "forward",
                "task_scores", "average", "whole", "backward_transfer", "forward_transfer", "forgetting",
                "learning_accuracy", "metrics", "cost", "versions", "git"):  # fmt: skip
        assert key in results, key
    assert len(results["scores"]) == 4
    assert results["direction"] == "higher"
    assert set(results["cost"][0]) >= {"seconds", "forward_examples", "backward_examples", "forward_tokens", "peak_memory_mb",
                                     "trainable_parameters", "stored_parameters", "replay_examples"}  # fmt: skip


def test_transfer_csv_equals_results_json(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    with (finished / "transfer.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["after", *results["tasks"]]
    assert [[float(v) for v in row[1:]] for row in rows] == results["scores"]


def test_every_score_can_be_recomputed_from_the_predictions(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for row in range(4):
        table = pyarrow.parquet.read_table(finished / "predictions" / f"after-{row:03d}.parquet").to_pydict()
        task, label = np.array(table["task"]), np.array(table["label"])
        for column, values in (("prediction", results["scores"]), ("own_prediction", results["task_scores"])):
            answer = np.array(table[column], dtype=object)
            for index, name in enumerate(results["tasks"]):
                assert 100 * (answer == label)[task == name].mean() == pytest.approx(values[row][index])


def test_adapters_load_with_peft_and_heads_as_safetensors(finished: Path, make) -> None:
    """PeftModel.from_pretrained on the backbone gives the same features as the run's module."""
    import peft

    run = make("method=dynamic_conpet")
    batch = run.data.test.batch([0, 1, 2])
    base = run.method.objective.adapters.model
    folders = sorted(path.name for path in (finished / "adapters").iterdir())
    assert folders == ["selector", "task000", "task001", "task002"]
    model = peft.PeftModel.from_pretrained(base, finished / "adapters" / "task001").eval()
    with torch.inference_mode():
        from_peft = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    for index in range(3):
        run.learn(index)
    run.method.objective.adapters.activate("task001")
    with torch.inference_mode():
        from_run = run.method.objective.adapters.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.allclose(from_peft, from_run.last_hidden_state, atol=1e-5)
    with safe_open(finished / "heads" / "task001.safetensors", "pt") as head:
        assert json.loads(head.metadata()["labels"]) == ["gold", "iron", "tin", "zinc"]
        assert torch.allclose(head.get_tensor("weight"), run.method.modules[1].weight, atol=1e-5)


def test_an_offline_wandb_run_can_be_read(finished: Path) -> None:
    """wandb's file contains the config, per-task scores on the task axis, the transfer table and the summary."""
    (file,) = finished.glob("wandb/offline-run-*/run-*.wandb")
    run = read_wandb(file)
    results = json.loads((finished / "results.json").read_text())
    assert run["config"]["method"]["name"] == "dynamic_conpet"
    assert run["group"] == f"files/dynamic_conpet/{results['signature']}"
    rows = [row for row in run["history"] if "average" in row or "score/fruit" in row]
    assert [row["task"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        for index, name in enumerate(results["tasks"]):
            assert row[f"score/{name}"] == results["scores"][row["task"]][index]
    table = run["tables"]["transfer"]
    assert table["columns"] == ["matrix", "row", "after", "task", "value"]
    for matrix, row, after, task, value in table["data"]:
        source = {"transfer": "scores", "backward": "backward", "forward": "forward", "own_labels": "task_scores"}[
            matrix
        ]
        assert value == results[source][row][results["tasks"].index(task)]
        assert after == ("" if row == 0 else results["tasks"][row - 1])
    assert sum(line[0] == "transfer" for line in table["data"]) == 12
    assert run["summary"]["average"] == results["average"]
    assert run["images"] == {"transfer_picture", "accuracy_picture", "loss_picture"}
    lines = [json.loads(line) for line in (finished / "steps.jsonl").read_text().splitlines()]
    steps = [row for row in run["history"] if "train/loss" in row]
    assert [row["step"] for row in steps] == [line["step"] for line in lines]
    for name in ("loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "memory_gb"):
        assert [row[f"train/{name}"] for row in steps] == [line[name] for line in lines]


def test_a_run_says_at_its_start_what_it_works_with(finished: Path, words: Path, clpet) -> None:
    """train.log holds the header; run.json names the machine."""
    text = (finished / "train.log").read_text()
    assert "data   72 train, 24 validation, 24 test examples" in text
    assert re.search(r"train  \d+ steps of 16 examples, 4 to \d+ a task", text)
    assert f"run    {finished}" in text
    host = json.loads((finished / "run.json").read_text())["host"]
    assert {"device", "dtype", "threads", "name"} <= host.keys()
    started = clpet("train", "method=sequential", *tiny_args(words), "evaluation.matrix=last").out.splitlines()
    assert started[0] == "starting sequential on files with tiny, seed 0"
    assert "model  tiny, 43,168 parameters, 2,048 trained (4.74 %), float32, cpu, 1 thread" in started
    assert "train  12 steps of 16 examples, 4 a task" in started


def test_options_and_variables_of_wandb_reach_its_file(words: Path, clpet, tmp_path: Path, monkeypatch) -> None:
    """An option has priority over wandb's variable, a variable over the default; weights are uploaded on request."""
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    args = ["train", "method=sequential", *tiny_args(words), "tracking=offline", "tracking.notes='why, and how'"]
    result = clpet(*args, "tracking.artifacts=true", "tracking.group=mine")
    assert result.code == 0
    (file,) = tmp_path.glob("outputs/*/*/s*/wandb/offline-run-*/run-*.wandb")
    assert f"sync  wandb sync {file.parent}" in result.out.splitlines()
    for _ in range(100):  # wandb's process may write the end of the file after the run
        run = read_wandb(file)
        if "model" in run["artifacts"] and any(row.get("scores_over_time_table") for row in run["history"]):
            break
        time.sleep(0.1)
    assert [run[key] for key in ("project", "display_name", "group", "notes")] == ["p", "n", "mine", "why, and how"]
    assert run["tags"] == ["a", "b"]
    recorded = run["config"]["run"]
    assert recorded["versions"]["python"]
    assert len(recorded["inputs"]["data"]) > 8
    assert {"git", "out"} <= recorded.keys()
    paths = run["artifacts"]["model"]
    assert {"results.json", "adapters/adapter_config.json"} <= {path.replace("default/", "") for path in paths}
    assert any(row.get("scores_over_time_table") for row in run["history"])


def test_an_unreachable_wandb_server_does_not_stop_a_run(words: Path, clpet, tmp_path: Path, monkeypatch) -> None:
    """With an API key but a closed port: one warning, an offline run, exit code 0."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    answer = clpet("train", "method=sequential", *tiny_args(words), "tracking=auto", "tracking.timeout=2")
    assert answer.code == 0
    assert list(tmp_path.glob("outputs/*/*/s*/wandb/offline-run-*"))
    assert "Traceback" not in answer.err
