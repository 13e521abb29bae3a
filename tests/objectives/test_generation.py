"""Answers of a decoder: continuous batching gives those of padded batches, and is refused where it would not."""

import numpy as np
import pyarrow.parquet
import pytest

from clpet.objectives.generation import continuous_answers, greedy, padded_answers, without_padding
from clpet.objectives.text_to_text import until
from tests.conftest import set_up, tiny_args

WRITES = ["model=tiny_llama", "objective=text_to_text", "benchmark.max_target=8"]


def test_continuous_batching_gives_the_answers_of_padded_batches(words) -> None:
    """Prompts of different lengths; one of the tokens that the model writes counts as an end, so that some end early."""
    run = set_up(tiny_args(words, "cache_dir=null", "method=sequential", *WRITES))
    objective, pool = run.method.objective, run.data.test
    rows = np.arange(6)
    batch = pool.batch(rows, objective.device)
    prompts = without_padding(batch)
    assert prompts == [pool.tokens(row).tolist() for row in rows]
    model = objective.adapters.model
    free = padded_answers(model, objective.inputs(batch), greedy(8, [0], 0, None), causal=True)
    ends = [free[0][2]]
    settings = greedy(8, ends, 0, None)
    padded = padded_answers(model, objective.inputs(batch), settings, causal=True)
    answers = continuous_answers(model, prompts, settings, pages=12)
    assert until(answers, ends) == until(padded, ends)
    assert any(len(answer) < 8 for answer in until(answers, ends))


@pytest.mark.parametrize(
    ("words_of_run", "line"),
    [
        ([], "is for answers that a decoder writes"),
        ([*WRITES, "evaluation.decode=rank"], "is for answers that a decoder writes"),
        ([*WRITES, "peft=prefix"], "does not support peft=prefix"),
        ([*WRITES, "hardware.shard=true"], "does not support hardware.shard=true"),
        ([*WRITES, "method=sapt"], "cannot be used with method=sapt"),
        (WRITES, "needs a CUDA device, hardware.dtype=bf16"),
    ],
)
def test_continuous_batching_is_refused_where_it_would_not_answer_each_example_by_itself(
    words_of_run: list[str], line: str, words, clpet
) -> None:
    args = tiny_args(words, "method=sequential", "hardware.generation=continuous", *words_of_run)
    result = clpet("train", *args)
    assert (result.code, result.err.count("\n")) == (1 if "CUDA" in line else 2, 1)
    assert f"hardware.generation=continuous {line}" in result.err


@pytest.mark.gpu
def test_a_run_with_continuous_batching_has_the_answers_of_padded_batches(words, clpet, tmp_path) -> None:
    """On a GPU with FlashAttention, in bf16; near ties between two tokens may differ, so one answer in ten may."""
    pytest.importorskip("flash_attn")
    args = [*tiny_args(words, "method=sequential", *WRITES), "hardware=gpu", "hardware.threads=null"]
    answers = []
    for generation in ("padded", "continuous"):
        folder = tmp_path / generation
        assert clpet("train", *args, f"hardware.generation={generation}", f"output_dir={folder}").code == 0
        (file,) = folder.glob("*/*/s*/predictions/after-003.parquet")
        answers.append(pyarrow.parquet.read_table(file)["prediction"].to_pylist())
    assert np.mean([one == two for one, two in zip(*answers, strict=True)]) >= 0.9
