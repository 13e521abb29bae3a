"""Every method on a CUDA device: it runs to its end, pictures included, and gives what a CPU gives."""

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
def test_a_gpu_gives_what_a_cpu_gives(method: str, clpet, words: Path, tmp_path: Path) -> None:
    """In fp32 the averages differ by two test examples at most, which rounding may decide.

    AdamW makes a full step of a gradient that is nothing but rounding: a larger eps leaves such steps out.
    """
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        args = [*tiny_args(words), f"method={method}", "train.lr=1e-2", "train.eps=1e-3", f"output_dir={out}"]
        ran = clpet("train", *args, f"hardware.device={device}", "hardware.dtype=fp32")
        assert ran.code == 0, ran.err
        found[device] = results(out)["average"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2.1 * ONE_EXAMPLE)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["peft=none", "method=ewc"], ["method=replay", "replay=rate"]])
def test_a_gpu_reads_plain_text_as_a_cpu(more: list[str], clpet, prose: Path, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        args = [*domain_args(prose), "method=sequential", *more, f"output_dir={out}"]
        ran = clpet("train", *args, f"hardware.device={device}", "hardware.dtype=fp32")
        assert ran.code == 0, ran.err
        found[device] = results(out)["average"]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
