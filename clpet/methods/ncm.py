"""NCM: the nearest class mean of frozen features, without training.

f(x) = h(x) / |h(x)|,   m_y = mean of f over the training examples of label y, divided by its norm
predicted: the label with the smallest |f(x) - m_y|^2, which is the one with the largest cosine
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from clpet.data.batches import Batch
from clpet.methods.statistics import FeatureStatistics


@dataclass
class NCM(FeatureStatistics):
    """Scores are minus the squared distances."""

    def feature(self, batch: Batch) -> Tensor:
        return F.normalize(super().feature(batch), dim=1)

    def scores(self, features: Tensor) -> Tensor:
        means = F.normalize(self.means(), dim=1)
        return 2 * features @ means.T - features.square().sum(1, keepdim=True) - means.square().sum(1)
