"""IncLoRA: a new low-rank branch per task, added to the frozen ones, h = W x + s sum_{i <= t} B_i A_i x."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.modular import module_name
from clpet.models.peft_options import FullFineTuning, Lora
from clpet.models.stacked_lora import StackedLora
from clpet.objectives.base import AnswerSpace, Objective, Predictions
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class IncLoRA(Method):
    """Base of methods with a LoRA branch per task, which subclasses weight in `route`.

    Rank, alpha (s = alpha / rank) and target layers are those of peft=lora.
    """

    supported_pefts: ClassVar[tuple[str, ...]] = ("lora",)
    supports_recompute: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = ("stack=increments",)

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if isinstance(peft, Lora) and peft.fields:
            raise ConfigError(
                f"method={self.name} computes its LoRA itself, from peft.r, peft.alpha, peft.dropout and peft.targets: "
                f"remove peft.{next(iter(peft.fields))}"
            )

    def init_adapters(self) -> None:
        """Attaches no branch yet: row 0 of the matrix is the bare backbone."""
        self.stack = StackedLora(self.objective.adapters)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_branch(index)
        super().learn(task, index, trainer)

    def add_branch(self, index: int) -> None:
        """Adds the branch A_t, B_t that task `index` trains; those of earlier tasks are frozen."""
        self.stack.add(derive(self.seed, "adapter", index))

    def route(self, batch: Batch) -> Tensor | None:
        """Weights of the n branches, [n] or [batch, n], newest last; None means 1 for each."""
        return None

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        return self.routed_loss(batch, self.route(batch))

    def routed_loss(self, batch: Batch, weights: Tensor | None) -> Tensor:
        """Cross-entropy of the model with its branches weighted by `weights`."""
        with self.stack.branch_weights(weights):
            return self.objective.loss(batch)

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        weights = self.route(batch) if self.stack.branches else None
        with self.stack.branch_weights(weights):
            predictions = super().predict(batch, choices)
        if weights is not None and weights.dim() == 2:
            predictions.extras["selected"] = weights.argmax(1)
        return predictions

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**self.stack.current(), **self.objective.parameters()}

    def save(self, folder: Path) -> None:
        """Writes each branch as a separate LoRA; using branches that are not simply added takes the router as well."""
        self.stack.save(folder, [module_name(index) for index in range(self.stack.branches)])

    def merged(self) -> nn.Module:
        model = super().merged()
        self.stack.merge()
        return model
