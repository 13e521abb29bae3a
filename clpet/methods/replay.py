"""Experience replay: sequential fine-tuning on new data mixed with old data, L = CE on the mixed batches.

With replay=fixed this is EMR, with replay=dynamic EMR*, which is static ConPET (Song et al., 2023, arXiv 2309.14763,
section 3.3).
"""

from dataclasses import dataclass
from typing import ClassVar

from clpet.errors import ConfigError
from clpet.methods.base import Method, ObjectiveType
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.replay.batch_plan import BatchPlan

MIXING = ("ratio", "limit", "copies", "max_copies", "rate")  # options of memories about batches with old examples


@dataclass
class Static(Method[ObjectiveType]):
    """One adapter and one head for all tasks. With future_labels=true the head has all labels from the start."""

    future_labels: bool = False

    def mixes_tasks(self, replay: str) -> bool:
        """True with future_labels: a softmax over all labels must not be restricted to those of one task."""
        return self.future_labels or super().mixes_tasks(replay)

    def tied_to_later_tasks(self, learned: int, before: int, now: int) -> str:
        return "method.future_labels=true trains the labels of all tasks from the start" if self.future_labels else ""

    def grow_head(self, index: int) -> None:
        if self.future_labels:
            self.objective.add_labels(range(len(self.benchmark.labels)))
        super().grow_head(index)


@dataclass
class Replay(Static[ObjectiveType]):
    """The config group `replay` selects which examples are stored and how they are mixed into batches."""

    uses_replay: ClassVar[bool] = True

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory: set replay=dynamic, fixed, share, reservoir or all")


@dataclass
class DrawnReplay(Replay[ObjectiveType]):
    """Base of methods that draw old examples themselves: a batch of the plan has new examples alone."""

    def mixes_tasks(self, replay: str) -> bool:
        return True  # what is computed from old examples is over all seen labels

    def plan(self, index: int) -> BatchPlan:
        return self.replay.new_only_plan(index)

    def ineffective(self) -> dict[str, str]:
        reason = f"method={self.name} draws old examples itself"
        return {**super().ineffective(), **{f"replay.{option}": reason for option in MIXING}}
