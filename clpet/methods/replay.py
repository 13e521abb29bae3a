"""Experience replay: sequential fine-tuning on new data mixed with old.

With replay=fixed this is EMR, with replay=dynamic EMR* of static ConPET (Song et al., 2023, arXiv 2309.14763;
section 3.3): cross-entropy on the mixed batches, nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar

from clpet.errors import ConfigError
from clpet.methods.base import Method


@dataclass
class Static(Method):
    """One adapter and one head. future_labels=true gives the head, and its softmax, all labels from the start."""

    future_labels: bool = False

    def mixes_tasks(self, replay: str) -> bool:
        """A softmax over labels to come is asked for by name: it is not cut to a task's own."""
        return self.future_labels or super().mixes_tasks(replay)

    def grow_head(self, index: int) -> None:
        if self.future_labels:
            self.objective.add_labels(range(len(self.benchmark.labels)))
        super().grow_head(index)


@dataclass
class Replay(Static):
    """What is kept and how it is mixed is the `replay` group's choice: dynamic, fixed, share, reservoir or all."""

    uses_replay: ClassVar[bool] = True

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory: replay=dynamic, fixed, share, reservoir or all")
