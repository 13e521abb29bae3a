"""L2P: a pool of prompts, of which those with the nearest keys are prepended (Wang et al., 2022, arXiv 2112.08654).

With the query q(x) = mean token embedding, the prompts of the top_k keys with the highest cosine are prepended, which
are top_k length vectors; L = CE - key_loss_weight mean_batch sum_chosen cos(q(x), key).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.data.benchmark import Benchmark
from clpet.methods.components.features import mean_pool, token_embeddings
from clpet.methods.prompts import Prompts
from clpet.training.step import StepContext


@dataclass
class L2P(Prompts):
    """One pool for all tasks. Prompts start as embeddings of random tokens, a key as the mean of its prompt."""

    pool: int = 10
    length: int = 5
    top_k: int = 3
    key_loss_weight: float = 0.5

    saved: ClassVar[tuple[str, ...]] = ("prompts=pool.prompts", "keys=pool.keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.top_k <= self.pool, "method.top_k", self.top_k, f"from 1 to method.pool={self.pool}")
        require(self.key_loss_weight >= 0, "method.key_loss_weight", self.key_loss_weight, "0 (off) or more")

    def reserved_positions(self, benchmark: Benchmark) -> int:
        return self.top_k * self.length

    def init_adapters(self) -> None:
        super().init_adapters()
        start = self.from_vocabulary(self.pool * self.length).unflatten(0, (self.pool, self.length))
        self.prompts, self.keys = nn.Parameter(start), nn.Parameter(start.mean(1))

    def nearest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cosines and indices [batch, top_k] of the chosen keys, nearest first."""
        query = mean_pool(token_embeddings(self.objective.adapters.model, batch), batch.attention_mask)
        return nearest(query, self.keys, self.top_k)

    def prompt(self, batch: Batch) -> Tensor:
        return self.prompts[self.nearest(batch)[1]].flatten(1, 2)

    def loss(self, context: StepContext) -> Tensor:
        return super().loss(context) - self.key_loss_weight * self.nearest(context.batch)[0].sum(1).mean()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"prompts": self.prompts, "keys": self.keys, **self.objective.parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return {"prompts": self.prompts, "keys": self.keys}


def nearest(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines [batch, k] of query [batch, d] with keys [M, d], and the indices of these keys."""
    top = (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).topk(k, dim=1)
    return top.values, top.indices
