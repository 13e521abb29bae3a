"""The batches of a fit, and ConPET's arithmetic: how many new and old examples are in a batch and in an epoch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.data.batches import EncodedDataset

Rows = np.ndarray  # row numbers of an EncodedDataset


@dataclass
class BatchPlan:
    """The batches of one fit: `epoch(e)` returns row arrays into `pool`, `steps` of them in every epoch.

    `gradient_mask` marks the rows of a batch that can have a gradient: only they are computed, while the loss stays a
    mean over the whole batch. `clock(t)` is the number of steps of the learning-rate schedule before step t of the fit;
    by default t.
    """

    pool: EncodedDataset
    steps: int
    epoch: Callable[[int], list[Rows]]
    gradient_mask: Callable[[Rows], np.ndarray] | None = None
    clock: Callable[[int], int] = int


def split_batch(size: int, ratio: float) -> tuple[int, int]:
    """(new, old) examples in a batch: ratio r > 0 is new:old, r < 0 is old:new = |r| (ConPET, section 3.1)."""
    share = abs(ratio) / (abs(ratio) + 1)
    count = int(size * share + 1e-9)  # 1e-9: a share such as 3/8 must not lose an example to rounding
    return (count, size - count) if ratio > 0 else (size - count, count)


def steps_and_val_batches(limit: int) -> tuple[int, int]:
    """(training steps, validation batches) per epoch: 80 % and 20 % of ConPET's limit L, rounded down."""
    return 4 * limit // 5, limit // 5


def copies_for_equal_compute(new: int, memory: int, limit: int, batch_size: int, max_copies: int) -> int:
    """Copies f of the memory that fill an epoch up to ceil(0.8 L) B examples, `new` of them new (ConPET, section 3.3).

    L is `limit` and B the batch size. Where the new examples alone fill the epoch, f = `max_copies`.
    """
    room = -(-4 * limit // 5) * batch_size - new
    return max_copies if room <= 0 else -(-room // memory)
