"""Zero-shot: the pretrained model, without any training. It says what a task needs no training for."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from clpet.data.benchmark import Task
from clpet.data.traits import Traits
from clpet.methods.base import Method
from clpet.replay.batch_plan import BatchPlan
from clpet.training.trainer import Trainer


@dataclass
class ZeroShot(Method):
    """All rows of the matrix are that before the first task."""

    has_cross_entropy: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    uses_validation: ClassVar[bool] = False
    supported_pefts: ClassVar[tuple[str, ...]] = ("frozen",)

    @classmethod
    def unmet(cls, traits: Traits) -> str:
        if traits.has_labels:
            return "a head that is not trained is random"
        if traits.frozen_backbone:
            return "it would compare the backbone with itself"
        return super().unmet(traits)

    def init_adapters(self) -> None:
        """Attaches nothing."""

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        """Learns nothing."""

    def stages(self, index: int) -> dict[str, BatchPlan]:
        return {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def save(self, folder: Path) -> None:
        """Writes nothing but the empty folder: there are no trained weights."""
        folder.mkdir(parents=True, exist_ok=True)
