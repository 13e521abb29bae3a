"""Joint training on the union of all tasks: the upper bound, which has no task order."""

from dataclasses import dataclass

from clpet.data.batches import Encoded
from clpet.data.benchmark import SPLITS, Benchmark, Task
from clpet.methods.base import Method
from clpet.objectives.base import Objective
from clpet.replay.base import AllReplay, NoReplay
from clpet.training.trainer import Trainer


@dataclass
class Joint(Method):
    """Has a single fit; only rows 0 and T of the matrix exist."""

    def curriculum(self) -> list[tuple[int, Task]]:
        train, validation, test = ([e for t in self.benchmark.tasks for e in t.split(split)] for split in SPLITS)
        return [(len(self.benchmark) - 1, Task("all tasks", train, validation, test, tuple(self.benchmark.labels)))]

    def tied_to_later_tasks(self, learned: int, before: int, now: int) -> str:
        return "it learns all tasks at once"

    def mixes_tasks(self, replay: str) -> bool:
        return True

    def setup(self, objective: Objective, benchmark: Benchmark, data: Encoded, replay: NoReplay, seed: int) -> None:
        everything = AllReplay()
        everything.setup(data, seed, replay.batch_size)
        super().setup(objective, benchmark, data, everything, seed)

    def after_task(self, task: Task, index: int) -> None:
        """Selects no memory, because no task follows."""

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.objective.add_labels(range(len(self.benchmark.labels)))
        self.fit(trainer, index)
