"""kNN: the labels of the nearest training examples in frozen features, without training (as in kNN-LM, 1911.00172).

With the `neighbours` nearest keys of a text, their squared distances d_i and labels y_i,
    p(y) = sum over i with y_i = y of softmax(-d / T)_i
    scale=relative  T is the mean of the d_i; the raw distances of hidden states would leave one neighbour only
    scale=absolute  T = 1, as published
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.methods.statistics import FrozenFeatures
from clpet.objectives.base import AnswerSpace, Predictions


class Scale(Enum):
    """The temperature of the softmax over distances."""

    relative = "relative"
    absolute = "absolute"


@dataclass
class KNN(FrozenFeatures):
    """Keeps the feature of every training example. Of equal distances the earlier example counts."""

    neighbours: int = 16
    scale: Scale = Scale.relative

    saved: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, "method.neighbours", self.neighbours, "at least 1")

    def init_adapters(self) -> None:
        super().init_adapters()
        device = self.objective.device
        self.keys = torch.zeros(0, self.objective.dim, device=device)  # [examples, dim]
        self.values = torch.zeros(0, dtype=torch.long, device=device)  # [examples]: their labels

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        self.keys, self.values = torch.cat([self.keys, features.float()]), torch.cat([self.values, labels])

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Logarithms of p(y), so that the softmax over the allowed labels divides by their sum."""
        query = self.feature(batch).float()
        if not len(self.keys):
            return Predictions(query.new_full((len(batch), len(self.counts)), float("-inf")))
        share = neighbour_shares(query, self.keys, self.values, len(self.counts), self.neighbours, self.scale)
        # A label that no neighbour has stays possible, behind all that one has, unless it was never learned.
        least = torch.finfo(share.dtype).tiny
        return Predictions(share.clamp(min=least).log().masked_fill(self.counts == 0, float("-inf")))

    def save(self, folder: Path) -> None:
        """Writes keys and labels as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"keys": self.keys.cpu(), "labels": self.values.cpu()}, folder / "neighbours.safetensors")


def neighbour_shares(query: Tensor, keys: Tensor, values: Tensor, labels: int, count: int, scale: Scale) -> Tensor:
    """[batch, labels]: p(y) of queries [batch, dim] from keys [n, dim] and their labels [n]."""
    distances = squared_distances(query, keys)
    nearest, index = distances.sort(dim=1, stable=True)
    nearest, index = nearest[:, :count], index[:, :count]
    if scale is Scale.relative:
        nearest = nearest / nearest.mean(1, keepdim=True).clamp(min=torch.finfo(nearest.dtype).tiny)
    shares = (-nearest).softmax(1)
    total: Tensor = (F.one_hot(values[index], labels).to(shares.dtype) * shares[:, :, None]).sum(1)
    return total


def squared_distances(query: Tensor, keys: Tensor) -> Tensor:
    """[batch, n]: |q - k|^2; each from its own differences, so it does not depend on what else is in the batch."""
    return torch.stack([(keys - one).square().sum(1) for one in query])
