"""What a trainer reports while it works, to whoever shows it."""

from typing import Protocol

from torch import Tensor


class Progress(Protocol):
    """Receiver of a fit's progress, such as a progress bar."""

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        """A fit starts."""

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        """A step is done; `loss` is the running mean of the epoch, still on the device."""

    def resumed(self, steps: int, examples: int) -> None:
        """A fit resumes after `steps` steps; `examples` of its current epoch are done."""

    def validated(self, epoch: int, score: float) -> None:
        """An epoch has its validation score."""


class NoProgress:
    """A receiver that shows nothing."""

    def fit(self, stage: str, epochs: int, steps: int) -> None: ...
    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None: ...
    def resumed(self, steps: int, examples: int) -> None: ...
    def validated(self, epoch: int, score: float) -> None: ...
