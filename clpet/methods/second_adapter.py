"""Base of methods that train one adapter and answer with another one of the same shape."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from clpet.data.batches import Batch
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.replay import Static
from clpet.objectives.base import AnswerSpace, Predictions


@dataclass
class SecondAdapter(Static):
    """`second` has the values of the other adapter; the head is shared."""

    saved: ClassVar[tuple[str, ...]] = ("second",)

    def init_adapters(self) -> None:
        super().init_adapters()
        self.second = SecondWeights(self, self.objective.adapters.tensors("default"))

    @property
    def answers_with_second(self) -> bool:
        """Whether the second adapter answers, and not the trained one."""
        return True

    def answering(self) -> contextlib.AbstractContextManager[object]:
        return self.second.active() if self.answers_with_second else contextlib.nullcontext()

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        with self.answering():
            return super().predict(batch, choices)

    def save(self, folder: Path) -> None:
        """Writes the adapter that answers."""
        with self.answering():
            super().save(folder)

    def merged(self) -> nn.Module:
        if self.answers_with_second:
            self.second.restore()
        return super().merged()
