"""Micro-batches: every row once, within the limits, and the same gradient however a batch is divided."""

import numpy as np
import pytest
import torch

from clpet.data.batches import EncodedDataset
from clpet.data.micro_batches import MicroBatchLimits
from clpet.errors import ConfigError

POOL = EncodedDataset([[1] * length for length in (3, 9, 1, 4, 5)], [0] * 5, [0] * 5, pad_id=0)


def divided(examples: int | None, tokens: int | None, pool: EncodedDataset = POOL) -> list[list[int]]:
    """Rows 4, 3, .., 0 as micro-batches."""
    rows = MicroBatchLimits(examples, tokens).divide(pool, np.arange(5)[::-1])
    return [part.tolist() for part in rows]


def test_limits_of_examples_and_tokens() -> None:
    assert divided(2, None) == [[4, 3], [2, 1], [0]]
    assert divided(None, None) == [[4, 3, 2, 1, 0]]
    assert divided(None, 10) == [[1], [4, 3], [0, 2]]  # 9, 2 x 5 and 2 x 3 tokens
    assert divided(None, 15) == [[1], [4, 3, 0], [2]]
    assert divided(2, 15) == [[1], [4, 3], [0, 2]]
    assert MicroBatchLimits(2).divide(POOL, np.arange(0)) == MicroBatchLimits().divide(POOL, np.arange(0)) == []


def test_answers_count_as_padded_on_their_own() -> None:
    """The longest text and the longest answer of a batch may be in different rows."""
    pool = EncodedDataset([[1] * 6, [1]], [0, 0], [0, 0], 0, answers=[[1], [1] * 4])
    assert pool.padded_tokens(np.arange(2)) == 2 * (6 + 4) == pool.batch([0, 1]).tokens
    assert [part.tolist() for part in MicroBatchLimits(tokens=19).divide(pool, np.arange(2))] == [[0], [1]]


def test_an_example_that_does_not_fit_is_refused() -> None:
    MicroBatchLimits(tokens=9).check(POOL)
    with pytest.raises(ConfigError, match=r"longest training example has 9 tokens: set hardware.max_tokens=9 or more"):
        MicroBatchLimits(tokens=8).check(POOL)


@pytest.mark.parametrize(
    "options", [["method=sequential"], ["method=agem", "replay=share", "replay.share=1"], ["method=sequential", "model=tiny_llama", "objective=text_to_text"]]
)  # fmt: skip
def test_gradients_do_not_depend_on_the_limit(options: list[str], make) -> None:
    """A fit with at most 60 padded tokens in a pass ends like one with whole batches, up to rounding."""
    runs = [make(*options, "train.epochs=1", f"hardware.max_tokens={limit}") for limit in ("null", 60)]
    largest = []
    for run in runs:
        sizes, batch = [], run.data.train.batch
        run.data.train.batch = lambda *args, batch=batch, sizes=sizes, **kw: noted(batch(*args, **kw), sizes)
        for index in range(2):
            run.learn(index)
        largest.append(max(sizes))
    assert largest[1] <= 60 < largest[0]
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in runs]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


def noted(batch, sizes: list[int]):
    """The batch; its number of padded tokens is appended to `sizes`."""
    sizes.append(batch.tokens)
    return batch
