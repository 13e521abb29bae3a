"""One adapter and head per task, the task given at test: the upper bound of task-incremental learning."""

from dataclasses import dataclass

from clpet.methods.base import Choices, Predictions
from clpet.methods.modular import Modular
from clpet.text import Batch


@dataclass
class Independent(Modular):
    """Tasks do not touch each other: its diagonal is the single-task score s_j of the transfer metrics."""

    task_id_at_test = True

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        assert choices.tasks is not None
        modules = choices.tasks[:, None]
        return Predictions(self.route(batch, modules), modules)
