"""Joint training on the union of all tasks at once: the upper bound without a task order."""

from dataclasses import dataclass

from clpet.memory import AllReplay, Held, Plan
from clpet.methods.base import Method
from clpet.tasks import SPLITS, Task
from clpet.training import Trainer


@dataclass
class Joint(Method):
    """Learns once; only rows 0 and T of the matrix exist."""

    def curriculum(self) -> list[tuple[int, Task]]:
        train, validation, test = ([e for t in self.benchmark.tasks for e in t.split(split)] for split in SPLITS)
        return [(len(self.benchmark) - 1, Task("all tasks", train, validation, test, tuple(self.benchmark.labels)))]

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.objective.head.grow(range(len(self.benchmark.labels)))
        self.fit(trainer, index)

    def validation(self, index: int) -> Held:
        return AllReplay.validation(self.replay, index)  # type: ignore[arg-type]

    def plan(self, index: int) -> Plan:
        return AllReplay.plan(self.replay, index)  # type: ignore[arg-type]
