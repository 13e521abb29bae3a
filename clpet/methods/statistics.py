"""Base of methods without training: the backbone is frozen, and labels are statistics of its features."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.classification import Classification
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan
from clpet.training.trainer import Trainer


@dataclass
class FrozenFeatures(Method[Classification]):
    """Subclasses keep something of the features of a task's training examples, and answer with it.

    One pass over every training example, without a gradient; the order of the tasks does not matter. A label without
    examples is never predicted.
    """

    needs_labels: ClassVar[bool] = True
    has_cross_entropy: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    uses_validation: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    rounds_with_unseen_labels: ClassVar[bool] = True  # all labels are scored by one matrix product
    supported_pefts: ClassVar[tuple[str, ...]] = ("frozen",)
    saved: ClassVar[tuple[str, ...]] = ("counts",)

    def init_adapters(self) -> None:
        device = self.objective.device
        self.counts = torch.zeros(len(self.benchmark.labels), dtype=torch.float64, device=device)  # examples per label

    def feature(self, batch: Batch) -> Tensor:
        """[batch, dim]: the vector of a text whose statistics are kept."""
        return self.objective.features(batch)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        rows = self.data.train.rows_of(index)
        labels = torch.from_numpy(self.data.train.labels[rows]).to(self.objective.device)
        self.add(self.embed(rows, self.feature).double(), labels)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds training features [n, dim] in fp64 with their labels [n]."""
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def stages(self, index: int) -> dict[str, BatchPlan]:
        return {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def stored_parameters(self) -> int:
        """Number of scalars, without those of labels that have no examples."""
        return super().stored_parameters() - int((self.counts == 0).sum())

    def num_labels(self) -> int:
        """Number of rows that are saved: up to the last label that has examples."""
        return int(self.counts.nonzero().max()) + 1 if bool(self.counts.any()) else 0

    def state_dict(self) -> State:
        """Without the rows of labels that are still to come: what is stored does not depend on later tasks."""
        return {**super().state_dict(), "counts": self.counts[: self.num_labels()].clone()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        missing = len(self.benchmark.labels) - len(self.counts)  # a run with fewer tasks had fewer labels
        self.counts = F.pad(self.counts, (0, missing))


@dataclass
class FeatureStatistics(FrozenFeatures):
    """Subclasses score test features against the sums of each label's training features, which are in fp64."""

    saved: ClassVar[tuple[str, ...]] = ("sums",)

    def init_adapters(self) -> None:
        super().init_adapters()
        size = len(self.benchmark.labels), self.objective.dim
        self.sums = torch.zeros(size, dtype=torch.float64, device=self.objective.device)

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        self.sums.index_add_(0, labels, features)

    def means(self) -> Tensor:
        """[labels, dim] fp64: the mean feature of every label, 0 for a label without examples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def scores(self, features: Tensor) -> Tensor:
        """[batch, all labels] fp64 from features [batch, dim] in fp64; the largest is predicted."""
        raise NotImplementedError

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        scores = self.scores(self.feature(batch).double())
        return Predictions(scores.masked_fill(self.counts == 0, float("-inf")).float())

    def stored_parameters(self) -> int:
        return super().stored_parameters() - int((self.counts == 0).sum()) * self.objective.dim

    def state_dict(self) -> State:
        return {**super().state_dict(), "sums": self.sums[: self.num_labels()].clone()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.sums = F.pad(self.sums, (0, 0, 0, len(self.benchmark.labels) - len(self.sums)))

    def save(self, folder: Path) -> None:
        """Writes sums and counts as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"sums": self.sums.cpu(), "counts": self.counts.cpu()}, folder / "statistics.safetensors")
