"""Every method on a CUDA device finishes with the scores of a CPU."""

from pathlib import Path

import pytest

from clpet.cli.options import options
from tests.conftest import domain_args, tiny_args
from tests.methods.test_all_methods import results

NEEDS_AN_ENCODER = {"slm"}
PLAIN_TEXT = {"dapt"}
ONE_EXAMPLE = 100 / 24  # percent of the test examples of the words benchmark


@pytest.mark.gpu
@pytest.mark.parametrize("method", sorted(set(options("method")) - NEEDS_AN_ENCODER - PLAIN_TEXT))
def test_a_gpu_gives_the_scores_of_a_cpu(method: str, clpet, words: Path, tmp_path: Path) -> None:
    """In fp32 the averages differ by at most two test examples, because of rounding.

    AdamW turns even a gradient of pure rounding errors into a full step; a larger eps suppresses such steps.
    """
    averages = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        args = [*tiny_args(words), f"method={method}", "train.lr=1e-2", "train.eps=1e-3", f"output_dir={out}"]
        ran = clpet("train", *args, f"hardware.device={device}", "hardware.dtype=fp32")
        assert ran.code == 0, ran.err
        averages[device] = results(out)["average"]
    assert averages["cuda"] == pytest.approx(averages["cpu"], abs=2.1 * ONE_EXAMPLE)


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
