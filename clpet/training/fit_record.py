"""Types of the records of fits, as checkpoints inside a task contain them."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, final

from torch import Tensor

from clpet.records import State
from clpet.training.optimizers import Moments

NumpyState = tuple[str, Sequence[int], int, int, float]


class RandomState(TypedDict):
    """The state of every global random generator."""

    torch: Tensor
    python: tuple[int, Sequence[int], float | None]
    numpy: NumpyState
    cuda: NotRequired[Tensor]


class StageHistory(TypedDict):
    """Sums over the fits of a stage, and the moments after the last one, where they are carried over."""

    steps: int
    warmup: int
    inserted: NotRequired[int]  # steps of the last fit that were not in its plan
    moments: NotRequired[dict[str, Moments]]


class BestState(TypedDict):
    """The best validation score of a fit so far, and the tensors that it belongs to."""

    score: float
    copy: list[Tensor]


class CommonRecord(TypedDict):
    """What the records of finished and unfinished fits share."""

    trained: Sequence[Tensor]
    method: State
    random: RandomState  # of the main rank
    ranks: NotRequired[list[RandomState]]  # of the other ranks
    cost: dict[str, float]


@final
class FinishedFit(CommonRecord):
    """The record of a finished fit: `over` is what later fits of the stage need of it."""

    over: StageHistory


class ProgressRecord(TypedDict):
    """The progress of an unfinished fit, without the trained tensors."""

    epoch: int
    step: int
    seen: int
    inserted: NotRequired[int]
    total: Tensor
    finite: Tensor
    best: BestState | None
    optimizer: list[Moments]


@final
class UnfinishedFit(CommonRecord, ProgressRecord):
    """The record of an unfinished fit."""


FitRecord = FinishedFit | UnfinishedFit
