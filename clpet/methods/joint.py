"""Joint training on the union of all tasks at once: the upper bound without a task order."""

from dataclasses import dataclass

from clpet.memory import AllReplay, Plan
from clpet.methods.base import Method
from clpet.tasks import Task
from clpet.training import Trainer


@dataclass
class Joint(Method):
    """Learns once; only rows 0 and T of the matrix exist."""

    def curriculum(self) -> list[tuple[int, Task]]:
        last = len(self.benchmark) - 1
        return [(last, Task("all tasks", *(sum((t.split(s) for t in self.benchmark.tasks), []) for s in _SPLITS)))]

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.objective.head.grow(range(len(self.benchmark.labels)))
        self.fit(trainer, index)

    def plan(self, index: int) -> Plan:
        return AllReplay.plan(self.replay, index)  # type: ignore[arg-type]


_SPLITS = ("train", "validation", "test")
