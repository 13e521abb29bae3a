"""One adapter (and head) per task, with the task given at test: the upper bound of task-incremental learning."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.methods.base import Method
from clpet.methods.modular import Modular, module_name
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.training.step import StepContext


@dataclass
class Independent(Modular):
    """Tasks do not influence each other: the diagonal of the matrix is the single-task score s_j of transfer metrics.

    If the objective has no head, a module is an adapter alone.
    """

    needs_labels: ClassVar[bool] = False
    supports_plain_text: ClassVar[bool] = False
    task_id_at_test = True

    def init_adapters(self) -> None:
        self.has_heads = self.objective.traits.has_labels
        self.modules = []
        if self.has_heads:
            super().init_adapters()

    def add_module(self, index: int) -> None:
        if self.has_heads:
            super().add_module(index)
        else:
            self.objective.adapters.add(module_name(index), derive(self.seed, "adapter", index))

    def loss(self, context: StepContext) -> Tensor:
        return super().loss(context) if self.has_heads else self.objective.loss(context.batch)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        if self.has_heads:
            return super().named_parameters()
        name = self.objective.adapters.names[-1]
        return {f"{name}.{key}": value for key, value in self.objective.adapters.tensors(name).items()}

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        assert choices.tasks is not None
        if self.has_heads:
            modules = choices.tasks[:, None]
            return Predictions(self.route(batch, modules), modules)
        adapters, name = self.objective.adapters, module_name(int(choices.tasks[0]))
        with adapters.using(name) if name in adapters.names else adapters.off():
            return Method.predict(self, batch, choices)
