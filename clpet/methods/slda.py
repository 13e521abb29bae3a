"""SLDA: linear discriminant analysis of frozen features, one example after the other (Hayes and Kanan, 2020).

With the class means m_y and a covariance S that all classes share (arXiv 1909.01520, section 4),
    L = ((1 - e) S + e I)^-1,   score_y(x) = (L m_y) . h(x) - m_y^T L m_y / 2
    update=exact      S is the pooled covariance within the classes, whatever the order of the examples (default)
    update=published  S and m_y are updated in turn, so S depends on the order, and the first example of a class adds
                      its own square
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.methods.statistics import FeatureStatistics
from clpet.records import State


class Update(Enum):
    """How an example changes the covariance."""

    exact = "exact"
    published = "published"


@dataclass
class SLDA(FeatureStatistics):
    """Stores a mean per label and one covariance."""

    shrinkage: float = 1e-4
    update: Update = Update.exact

    saved: ClassVar[tuple[str, ...]] = ("scatter",)

    def __post_init__(self) -> None:
        require(0 < self.shrinkage <= 1, "method.shrinkage", self.shrinkage, "in (0, 1]")

    def init_adapters(self) -> None:
        super().init_adapters()
        dim = self.objective.dim
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.objective.device)  # n S
        self.discriminant: tuple[Tensor, Tensor] | None = None  # weights [dim, labels], biases [labels]

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.discriminant = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.discriminant = None
        if self.update is Update.published:
            for row in range(len(labels)):
                self.add_published(features[row : row + 1], labels[row : row + 1])
            return
        for label in labels.unique():
            new, count, mean = features[labels == label], self.counts[label], self.means()[label]
            centred, shift = new - new.mean(0), new.mean(0) - mean
            # The scatter of two groups is that of each, and that of their means (Chan et al., 1979).
            self.scatter += centred.T @ centred + count * len(new) / (count + len(new)) * torch.outer(shift, shift)
            super().add(new, label.expand(len(new)))

    def add_published(self, features: Tensor, labels: Tensor) -> None:
        """Adds one example: S <- (n S + n / (n + 1) u u^T) / (n + 1) with u = x - m_y."""
        count = self.counts.sum()
        u = features[0] - self.means()[labels[0]]
        self.scatter += count / (count + 1) * torch.outer(u, u)
        super().add(features, labels)

    def scores(self, features: Tensor) -> Tensor:
        self.discriminant = self.discriminant or self.solve()
        weights, biases = self.discriminant
        return features @ weights + biases

    def solve(self) -> tuple[Tensor, Tensor]:
        """L m_y [dim, labels] and -m_y^T L m_y / 2 [labels]."""
        covariance, means = self.scatter / self.counts.sum().clamp(min=1), self.means()
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * torch.eye(len(covariance)).to(covariance)
        weights = torch.linalg.solve(shrunk, means.T)
        return weights, -(means.T * weights).sum(0) / 2
