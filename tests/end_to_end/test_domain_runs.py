"""Runs on plain text: every method that supports it, identities of perplexities, and resuming."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from clpet import base_model
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.data.benchmark import Benchmark
from clpet.replay.fixed_fraction import FixedFractionReplay
from clpet.reporting.progress import Display
from clpet.runtime.hardware import Hardware
from tests.conftest import domain_args, killed_run, methods_of
from tests.objectives.test_language_modeling import domains, make_objective
from tests.runs.test_stored_bytes import check_stored_bytes

METHODS = sorted(set(methods_of("language_modeling")) - {"zero_shot"})
QUICK = {"sequential", "dapt", "kif"}  # the others are marked slow
NEEDS = {"replay": ["replay=rate"], "emr": ["replay=rate"]}
FULL = {"sequential", "joint", "dapt", "replay", "emr"}  # methods that train all weights; the others train adapters


def load_results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*/s*/results.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_every_method_lowers_the_perplexity_of_its_training_domain(method: str, prose: Path, clpet) -> None:
    peft = [] if method in FULL else ["peft=lora"]
    peft = {"osf": ["peft=osf"], "l2p": ["peft=frozen"], "progressive_prompts": ["peft=frozen"]}.get(method, peft)
    fisher = ["method.fisher=batch"] if method == "ewc" else []
    result = clpet("train", f"method={method}", *domain_args(prose, *peft, *fisher, *NEEDS.get(method, [])))
    assert result.code == 0, result.err
    scores, last = load_results(Path("outputs"))["scores"], -1 if method == "joint" else 1
    assert scores[last][0] < 0.99 * scores[0][0]
    (run,) = Path("outputs").glob("*/*/s*")
    check_stored_bytes(run, method)


@pytest.mark.slow
def test_identities(prose: Path, clpet) -> None:
    """CPT of the first domain is its DAPT bit for bit; row 0 does not depend on the order; lr=0 changes nothing."""
    runs = {"listed": [], "reversed": ["order=reversed"], "dapt": ["method=dapt"], "still": ["train.lr=0"],
            "two": ["tasks=[birds,tides]"]}  # fmt: skip
    for name, more in runs.items():
        args = domain_args(prose, "method=sequential", f"output_dir={name}", "peft=none", *more)
        assert clpet("train", *args).code == 0
    listed, reversed_order, dapt, untrained, two = (load_results(Path(name)) for name in runs)
    assert listed["tasks"] == ["birds", "metals", "tides"]
    assert listed["direction"] == "lower"
    assert listed["scores"][1][0] == dapt["scores"][1][0]
    assert listed["scores"][0] == reversed_order["scores"][0][::-1] == dapt["scores"][0]
    assert dapt["scores"][2] == [None, dapt["scores"][2][1], None]
    assert all(row == untrained["scores"][0] for row in untrained["scores"])
    # Leaving out a domain does not change the random draws of the others.
    assert two["scores"][1] == [listed["scores"][1][0], listed["scores"][1][2]]
    assert reversed_order["scores"][1][0] == dapt["scores"][3][2]
    assert listed["whole"] == pytest.approx(math.exp(sum(listed["correct"][-1]) / sum(listed["total"][-1])), rel=1e-12)


def test_training_lowers_the_ranks_of_key_terms(prose: Path, clpet) -> None:
    args = domain_args(prose, "method=sequential", "evaluation.rank_prompts=4", "train.epochs=4")
    assert clpet("train", *args).code == 0
    rows = load_results(Path("outputs"))["diagnostics"]
    assert {"median_rank", "mean_log_rank", "median_rank/birds", "mean_log_rank/tides"} <= rows[0].keys()
    assert rows[1]["mean_log_rank/birds"] < rows[0]["mean_log_rank/birds"]
    assert all(1 <= row["median_rank"] <= 266 for row in rows)


def test_evaluation_every_keeps_the_diagonal_and_both_ends(prose: Path, clpet) -> None:
    assert clpet("train", *domain_args(prose, "method=sequential", "evaluation.every=3")).code == 0
    scores = load_results(Path("outputs"))["scores"]
    assert [[value is not None for value in row] for row in scores] == [
        [True] * 3, [True, False, False], [False, True, False], [True] * 3]  # fmt: skip


def test_replay_rate_zero_equals_no_replay(prose: Path, clpet) -> None:
    for name, more in {"none": ["method=sequential"], "zero": ["method=replay", "replay=rate", "replay.rate=0"],
                       "half": ["method=replay", "replay=rate", "replay.rate=0.5"]}.items():  # fmt: skip
        assert clpet("train", *domain_args(prose, f"output_dir={name}", *more)).code == 0
    no_replay, zero, half = (load_results(Path(name)) for name in ("none", "zero", "half"))
    assert no_replay["scores"] == zero["scores"]
    assert half["scores"][1] == no_replay["scores"][1]
    assert half["scores"][2] != no_replay["scores"][2]
    without_replay, with_replay = no_replay["cost"][1]["forward_examples"], half["cost"][1]["forward_examples"]
    assert with_replay == 2 * without_replay


def test_a_base_model_is_trained_again_if_damaged_or_of_another_precision(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = []

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            (folder / f"{len(dtypes)}.safetensors").write_bytes(b"weights")

    def train(backbone, benchmark, hardware, folder: Path, display) -> None:
        dtypes.append(str(hardware.torch_dtype))
        base_model._save(Saved(), Saved(), folder)

    monkeypatch.setattr(base_model, "_train", train)

    def prepared(dtype: str) -> Path:
        config = parse_config(
            compose_config(domain_args(prose, "method=sequential", "benchmark.base=tides", f"hardware.dtype={dtype}"))
        )
        model, hardware = build(config.model, "model"), build(config.hardware, "hardware")
        benchmark = build(config.benchmark, "benchmark").load(config.data_dir)
        display = Display(Console(quiet=True), 0)
        prepared = base_model.prepare(model, benchmark, hardware, tmp_path, tmp_path, display)
        assert model.path is None
        assert not prepared.random_weights
        return Path(prepared.path)

    first = prepared("fp32")
    assert prepared("fp32") == first
    assert prepared("bf16") != first
    assert dtypes == ["torch.float32", "torch.bfloat16"]
    file = first / "1.safetensors"
    file.write_bytes(b"weightt")
    assert prepared("fp32") == first
    assert len(dtypes) == 3
    assert [path.read_bytes() for path in first.glob("*.safetensors")] == [b"weights"]


def test_random_weights_without_a_base_give_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for name, warned in (("tiny_llama_s", True), ("minilm", False)):
        caplog.clear()
        model = build(parse_config(compose_config([f"model={name}"])).model, "model")
        base_model.prepare(model, Benchmark("b", []), Hardware(), None, tmp_path, Display(Console(quiet=True), 0))
        assert ("has random weights and is not pretrained" in caplog.text) is warned


@pytest.mark.slow
def test_a_base_model_is_trained_once(prose: Path, clpet) -> None:
    args = domain_args(prose, "method=sequential", "benchmark.base=tides", "model.base.epochs=2")
    first, second = (clpet("train", *args, f"seed={seed}") for seed in (0, 1))
    assert first.code == second.code == 0
    assert "base model on tides" in first.out
    assert "base model on tides" not in second.out
    uncached = clpet("train", *args, "cache_dir=/proc/clpet", "output_dir=without")
    assert (uncached.code, "base model on tides" in uncached.out) == (0, True)
    paths = [*sorted(Path("outputs").glob("*/*/s*/results.json")), *Path("without").glob("*/*/s*/results.json")]
    one, two, three = (json.loads(path.read_text()) for path in paths)
    assert one["scores"] == three["scores"]
    assert one["tasks"] == ["birds", "metals"]
    assert one["scores"][0] == two["scores"][0]
    assert max(one["scores"][0]) < 230  # below 266, the number of byte tokens: it was trained on English


def test_fixed_fraction_replay_has_its_rate() -> None:
    """|replayed - rate * total| is at most one window; the base corpus can be a source."""
    data = make_objective(benchmark=domains(length=8, base=True)).encode()
    for rate, source in [(0.01, "past"), (0.05, "past"), (0.25, "base"), (0.5, "both")]:
        replay = FixedFractionReplay(rate=rate, source=source)
        replay.setup(data, 0, 4)
        replay.update_memory(0, lambda rows: np.empty(0))
        rows = np.concatenate(replay.plan(1).epoch(0))
        old = (data.train.tasks[rows] != 1).sum()
        assert abs(old - rate * len(rows)) <= 1
        assert {"past": {0}, "base": {-1}, "both": {-1, 0}}[source] >= set(data.train.tasks[rows]) - {1}
        assert sorted(rows[data.train.tasks[rows] == 1]) == data.train.rows_of(1).tolist()
        assert replay.plan(1).steps == len(replay.plan(1).epoch(0))


def test_replay_visits_every_old_window_before_repeating_one() -> None:
    """Over several epochs and passes through the old windows."""
    data = make_objective(benchmark=domains(length=8, base=True)).encode()
    replay = FixedFractionReplay(rate=0.3)
    replay.setup(data, 0, 4)
    replay.update_memory(0, lambda rows: np.empty(0))
    plan, counts = replay.plan(1), np.zeros(len(data.train), int)
    for epoch in range(7):
        counts += np.bincount(np.concatenate(plan.epoch(epoch)), minlength=len(counts))
        assert np.ptp(counts[data.train.rows_of(0)]) <= 1
    assert counts[data.train.rows_of(0)].min() >= 1


def kill_after(tasks: int) -> None:
    """From now on this process is killed once the state after a number of tasks is saved."""
    from clpet.runtime import run_checkpoint

    save = run_checkpoint.RunState.save

    def save_and_die(self, folder, method_state, identity) -> None:
        save(self, folder, method_state, identity)
        if self.done == tasks:
            os.kill(os.getpid(), signal.SIGKILL)

    run_checkpoint.RunState.save = save_and_die


def kill_at_the_seventh_save() -> None:
    """From now on this process is killed once it has saved seven times inside tasks."""
    from clpet.training import fit_checkpoint

    save, saves = fit_checkpoint.FitCheckpointer.save, []

    def save_and_die(self, *args) -> None:
        save(self, *args)
        saves.append(args)
        if len(saves) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    fit_checkpoint.FitCheckpointer.save = save_and_die


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["benchmark.stream=true"], ["method=kif", "peft=lora", "replay=rate"]])
def test_run_killed_inside_a_domain_resumes_bit_for_bit(more: list[str], prose: Path, clpet, tmp_path: Path) -> None:
    method = [] if "method=kif" in more else ["method=sequential"]
    args = ["train", *domain_args(prose, "train.global_batch_size=4", *method, *more)]
    assert clpet(*args, "output_dir=uninterrupted").code == 0
    killed_run(kill_at_the_seventh_save, tmp_path, *args, "output_dir=killed", "train.save_minutes=1e-9")
    resumed = clpet(*args, "output_dir=killed")
    assert resumed.code == 0
    assert "inside task" in resumed.out
    assert load_results(Path("uninterrupted"))["scores"] == load_results(Path("killed"))["scores"]
    (one,), (two,) = (
        sorted(Path(name).glob("*/*/s*/adapters/*/*.safetensors")) for name in ("uninterrupted", "killed")
    )
    a, b = load_file(one), load_file(two)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        ["sequential"],
        ["sequential", "benchmark.stream=true"],
        ["kif", "peft=lora"],
        ["replay", "replay=rate"],
        ["dapt"],
    ],
)
def test_run_killed_after_a_domain_resumes_bit_for_bit(variant: list[str], prose: Path, clpet, tmp_path: Path) -> None:
    args = ["train", *domain_args(prose, *[f"method={variant[0]}", *variant[1:]])]
    assert clpet(*args, "output_dir=uninterrupted").code == 0
    killed_run(lambda: kill_after(2), tmp_path, *args, "output_dir=killed")
    resumed = clpet(*args, "output_dir=killed")
    assert resumed.code == 0
    assert "resuming after 2 of 3" in resumed.out
    assert load_results(Path("uninterrupted"))["scores"] == load_results(Path("killed"))["scores"]
    (one,), (two,) = (
        sorted(Path(name).glob("*/*/s*/adapters/*/*.safetensors")) for name in ("uninterrupted", "killed")
    )
    a, b = load_file(one), load_file(two)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=crl"], "method=crl does not support objective=language_modeling: it needs labels"),
        (["method=sequential", "replay=fixed", "method=replay"], "chooses its memory by class logits"),
        (["method=sequential", "benchmark.max_length=9000", "benchmark.max_test=1"], "this model reads at most 1024 tokens"),
        (["method=sequential", "benchmark.max_length=1000", "max_train=2"], "fewer than one window of 1000"),
        (["method=sequential", "evaluation.bos=true", "benchmark.document_mask=true"], "does not support benchmark.document_mask"),
        (["method=sequential", "model=tiny_t5"], "language_modeling needs a decoder or encoder"),
        (["method=sequential", "benchmark.base=cloud"], "benchmark.base=cloud is not a domain"),
        (["method=sequential", "order=similar", "benchmark.reference=nowhere"], "benchmark.reference=nowhere is neither"),
        (["method=sequential", "evaluation.stride=40"], "evaluation.stride=40 would skip text"),
        (["method=sequential", "evaluation.every=0"], "evaluation.every must be at least 1"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], message: str, prose: Path, clpet) -> None:
    result = clpet("train", *domain_args(prose, *words))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not list(Path("outputs").glob("*/*/s*/run.json"))
