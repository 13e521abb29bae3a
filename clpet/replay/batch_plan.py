"""The batches of a fit, and how many new and old examples a batch and an epoch hold (ConPET's arithmetic)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clpet.data.batches import EncodedDataset

Rows = np.ndarray


@dataclass
class BatchPlan:
    """The batches of one fit: `epoch(e)` lists row arrays into `pool`, `steps` of them in every epoch.

    `gradient_mask` marks the rows of a batch that can give a gradient: only they are computed, while the loss stays a
    mean over the whole batch. `clock` is how many steps of the learning-rate schedule lie before step t of the fit.
    """

    pool: EncodedDataset
    steps: int
    epoch: Callable[[int], list[Rows]]
    gradient_mask: Callable[[Rows], np.ndarray] | None = None
    clock: Callable[[int], int] = int


def split_batch(size: int, ratio: float) -> tuple[int, int]:
    """(new, old) places of a batch: ratio r > 0 is new:old, r < 0 is old:new = |r| (ConPET, section 3.1)."""
    share = abs(ratio) / (abs(ratio) + 1)
    part = int(size * share + 1e-9)  # a share such as 3/8 must not lose a place to rounding
    return (part, size - part) if ratio > 0 else (size - part, part)


def steps_and_val_batches(limit: int) -> tuple[int, int]:
    """(training steps, validation batches) per epoch of ConPET's limit L: 80 % and 20 %, in integers."""
    return 4 * limit // 5, limit // 5


def copies_for_equal_compute(new: int, memory: int, limit: int, batch: int, most: int) -> int:
    """f copies of `memory` examples that fill an epoch up to ceil(0.8 L) B examples; `most` where `new` ones do.

    ConPET, section 3.3.
    """
    room = -(-4 * limit // 5) * batch - new
    return most if room <= 0 else -(-room // memory)
