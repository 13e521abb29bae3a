"""evaluation.probes: zero before training, equal to direct computation afterwards, and without effect on a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.conftest import set_up, tiny_args
from tests.runs.conftest import only, refused

ALL = "evaluation.probes=[kl,nll,representation,weights]"
ANSWERS = (
    "objective=text_to_text",
    "method=sequential",
    "benchmark.max_target=8",
    "train.lr=1e-2",
    "evaluation.decode=rank",
)


def diagnostics(pattern: str = "outputs/*/*/s*") -> list[dict[str, float]]:
    return json.loads((only(pattern) / "results.json").read_text())["diagnostics"]


def probes(row: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("probe/"): value for name, value in row.items() if name.startswith("probe/")}


@pytest.mark.parametrize(
    ("model", "peft", "method", "asked"),
    [
        ("tiny_llama", "lora", "sequential", ALL),
        pytest.param("tiny_llama", "none", "sequential", ALL, marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", "lora", "inc_lora", ALL, marks=pytest.mark.slow),
        pytest.param("tiny_llama", "lora", "sd_lora", ALL, marks=pytest.mark.slow),
        pytest.param("tiny_llama", "osf", "osf", "evaluation.probes=[kl,nll,representation]", marks=pytest.mark.slow),
        pytest.param("tiny_t5", "lora", "ewc", "evaluation.probes=[kl,representation,weights]", marks=pytest.mark.slow),
    ],
)
def test_drift_is_zero_before_training_and_grows(
    model: str, peft: str, method: str, asked: str, words: Path, clpet
) -> None:
    answer = clpet("train", *tiny_args(words, *ANSWERS), f"model={model}", f"peft={peft}", f"method={method}", asked)
    assert answer.code == 0, answer.err
    rows = [probes(row) for row in diagnostics()]
    first, last = rows[0], rows[-1]
    for name, value in first.items():
        expected = 1 if name.startswith("cka") else 0
        if not name.startswith(("effective_rank", "nll/")):
            # OSF starts from a decomposition, whose product is rounded.
            assert value == (pytest.approx(expected, abs=1e-6) if peft == "osf" else expected), name
    assert all(last[f"kl_{way}/task"] > 1e-4 for way in ("forward", "reverse"))
    assert last["cka"] < 1
    if "weights" in asked:
        assert last["weight_norm_relative"] > 0
        assert 1 <= last["weight_stable_rank"] <= last["weight_effective_rank"]
    if "nll" in asked:
        assert last["nll_drift/neutral"] == pytest.approx(last["nll/neutral"] - first["nll/neutral"], abs=1e-6)
        assert last["kl_forward/neutral"] > 0
    assert f"probes {asked.split('[')[1].rstrip(']').replace(',', ', ')} on" in answer.out


def test_a_run_is_the_same_with_and_without_probes(words: Path, tmp_path: Path, clpet) -> None:
    args = ("train", *tiny_args(words, *ANSWERS), "model=tiny_llama", "peft=none", "train.epochs=1")
    assert clpet(*args, "output_dir=without").code == 0
    assert clpet(*args, "output_dir=with", ALL, "evaluation.probe_tokens=256").code == 0
    without, probed = (only(str(f"{name}/*/*/s*")) for name in ("without", "with"))
    for file in without.glob("adapters/**/*.safetensors"):
        assert file.read_bytes() == (probed / file.relative_to(without)).read_bytes()
    scores = [json.loads((run / "results.json").read_text())["scores"] for run in (without, probed)]
    assert scores[0] == scores[1]
    assert without.name != probed.name


def test_a_resumed_run_measures_the_same(words: Path, clpet) -> None:
    """The state after two of three tasks is loaded, and the last row measured once more."""
    args = ("train", *tiny_args(words, *ANSWERS), "model=tiny_llama", ALL, "evaluation.probe_tokens=256")
    assert clpet(*args).code == 0
    folder = only()
    before = diagnostics()
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "state" / "003")
    answer = clpet(*args)
    assert "resuming after 2 of 3 tasks" in answer.out
    assert diagnostics() == before


def test_values_are_those_of_direct_computation(words: Path) -> None:
    run = set_up(tiny_args(words, "cache_dir=null", *ANSWERS, "model=tiny_llama", ALL, "evaluation.probe_tokens=300"))
    run.learn(0)
    values = run.session.probes.measure(1)
    adapters = run.method.objective.adapters
    spectra, norm = [], 0.0
    for module in adapters.model.modules():
        if isinstance(module, LoraLayer):
            spectra.append(torch.linalg.svdvals(module.get_delta_weight("default").detach().double()))
            norm += float(module.get_base_layer().weight.square().sum())
    assert values["probe/weight_norm"] == pytest.approx(float(torch.cat(spectra).square().sum().sqrt()), rel=1e-5)
    assert values["probe/weight_norm_relative"] == pytest.approx(values["probe/weight_norm"] / norm**0.5)
    ids = run.session.probes.windows
    assert ids.shape == (2, 128)
    with torch.no_grad():
        now = adapters.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        with adapters.off():
            base = adapters.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = (base.exp() * (base - now)).sum(-1).mean()
    assert values["probe/kl_forward/neutral"] == pytest.approx(float(expected), rel=1e-4)
    nll = -now.gather(2, ids[:, 1:, None]).mean()
    assert values["probe/nll/neutral"] == pytest.approx(float(nll), rel=1e-5)


def test_merged_models_are_compared_as_they_answer(words: Path) -> None:
    """One LoRA is trained, but the model that answers has the merged change of all tasks."""
    run = set_up(tiny_args(words, "cache_dir=null", *ANSWERS, "model=tiny_llama", "method=merge", ALL,
                           "evaluation.probe_tokens=128"))  # fmt: skip
    for index in range(2):
        run.learn(index)
    values, adapters = run.session.probes.measure(2), run.method.objective.adapters
    changes = run.method.merged_increments.tensors
    norm = torch.cat([value.flatten() for value in changes.values()]).norm()
    assert values["probe/weight_norm"] == pytest.approx(float(norm), rel=1e-5)
    ids = run.session.probes.windows
    with torch.no_grad():
        with adapters.off():
            base = adapters.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        now = run.method.merged()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = (base.exp() * (base - now)).sum(-1).mean()
    assert values["probe/kl_forward/neutral"] == pytest.approx(float(expected), rel=1e-3)


def test_a_prefix_moves_the_model_before_training(words: Path) -> None:
    """A random prefix is not the identity: their drift is measured against the model without it."""
    run = set_up(tiny_args(words, "cache_dir=null", *ANSWERS, "model=tiny_llama", "peft=prefix", "evaluation.decode=generate",
                           "evaluation.probes=[kl,nll,representation]", "evaluation.probe_tokens=256"))  # fmt: skip
    values = run.session.probes.measure(0)
    assert values["probe/kl_forward/neutral"] > 1e-4
    assert values["probe/cka"] < 1
    assert np.isfinite(list(values.values())).all()


def test_labels_have_hidden_states_and_weights(words: Path, clpet) -> None:
    args = ("train", *tiny_args(words), "method=sequential")
    assert clpet(*args, "evaluation.probes=[representation,weights]").code == 0
    rows = [probes(row) for row in diagnostics()]
    assert (rows[0]["cka"], rows[0]["weight_norm"]) == (1, 0)
    assert rows[-1]["weight_norm"] > rows[1]["weight_norm"] > 0
    assert "cka/block01" in rows[1]


@pytest.mark.parametrize(
    "words_of",
    [
        ("evaluation.probes=[kl]", "method=sequential"),
        ("evaluation.probes=[nosuch]",),
        ("evaluation.probes=[weights]", "method=dynamic_conpet"),
        ("evaluation.probes=[weights]", "method=sequential", "peft=ia3"),
        ("evaluation.probes=[representation]", *ANSWERS, "model=tiny_llama", "peft=blocks", "peft.every=1"),
        ("evaluation.probes=[nll]", *ANSWERS, "model=tiny_t5"),
        ("evaluation.probes=[representation]", "method=sequential", "hardware.shard=true"),
        ("evaluation.probes=[representation]", "method=sequential", "evaluation.probe_tokens=0"),
        ("evaluation.probes=[representation]", "method=sequential", "evaluation.probe_text=nowhere.txt"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused(words_of: tuple[str, ...], words: Path, clpet) -> None:
    answer = clpet("train", *tiny_args(words), *words_of)
    assert refused(answer), answer.err
    assert not list(Path().glob("outputs/*/*/s*/results.json"))
