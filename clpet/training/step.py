"""What a method's code is given inside a training step, and the hooks in which that code runs."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch import Tensor

from clpet.data.batches import Batch, EncodedDataset


@dataclasses.dataclass
class StepContext:
    """One optimiser step of a fit. All numbers count from 0.

    `rows` [global batch] are the rows of the step in `pool`. They are the same on all ranks and for every division into
    micro-batches, so a decision that depends on them alone holds for the whole step.
    """

    task: int
    stage: str  # name of the fit in a task; "" in a method with a single fit
    epoch: int
    step: int  # in the epoch
    rows: np.ndarray
    pool: EncodedDataset | None
    micro_batch: Batch | None = None  # set while `loss` runs
    counts: bool = True  # False: it repeats a row, so that sharded ranks run equally many passes; its loss is dropped

    @property
    def batch(self) -> Batch:
        """The micro-batch whose loss is computed; only `loss` has one."""
        if self.micro_batch is None:
            raise AttributeError("a step has a batch inside `loss` only; in other hooks use context.rows")
        return self.micro_batch

    @classmethod
    def of(cls, batch: Batch) -> "StepContext":
        """The first step of a fit that consists of a single batch, to call `loss` outside of a fit."""
        return cls(0, "", 0, 0, batch.rows, batch.pool, batch)


@dataclasses.dataclass
class StepHooks:
    """Code that runs inside the steps of a fit, in the order of the fields; all but `loss` are optional.

    before_step       before the first micro-batch
    loss              for every micro-batch: its loss, a mean over its examples (or predicted tokens), to be minimised
    step_loss         once per step, however many micro-batches and ranks there are: a term that is added to the loss
                      and does not depend on the batch, such as a penalty on weights; None adds nothing
    adjust_gradients  when the step's gradient is complete, before clipping and the update
    after_step        after every update that is not skipped; gradients are still available
    end_step          at the end of every step, also of a skipped one; gradients are already cleared
    validate          after every epoch with train.select=best: a score, higher is better
    insert            between two batches of the plan, and after its last: the rows of a batch to be trained on first,
                      asked for until it is None; such a step does not count in the plan or the learning-rate schedule
    """

    loss: Callable[[StepContext], Tensor]
    before_step: Callable[[StepContext], None] | None = None
    step_loss: Callable[[StepContext], Tensor | None] | None = None
    adjust_gradients: Callable[[StepContext], None] | None = None
    after_step: Callable[[StepContext], None] | None = None
    end_step: Callable[[StepContext], None] | None = None
    validate: Callable[[], float] | None = None
    insert: Callable[[], np.ndarray | None] | None = None

    def interleaved(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
        """The batches of a plan and those inserted between them, each with whether it is of the plan.

        `insert` is called when the step before is over; what it returns first is what a stopped fit had ahead.
        """
        for planned in itertools.chain(batches, [None]):
            while self.insert is not None and (rows := self.insert()) is not None:
                yield rows, False
            if planned is not None:
                yield planned, True
