"""SAPT-LoRA: attention over task keys weights the LoRA branches, in training and at test.

Zhao et al., 2024, arXiv 2401.08295. h = W x + sum_i w_i s B_i A_i x with the router
    x' = LayerNorm(SiLU(W2 W1 max_pool(embeddings))),    w = softmax_i(k_i . x' / sqrt(d)).
L = CE + kl_ratio sum_{i<t} KL(w after task i || w now), averaged over stored inputs of each old task i: the router's
weights for old inputs are distilled.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Task
from clpet.methods.components.features import max_pool, token_embeddings, vocabulary
from clpet.methods.inc_lora import IncLoRA
from clpet.replay.exemplar_selection import stratified_sample
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Query(nn.Module):
    """x' = LayerNorm(SiLU(W2 W1 x)), d -> hidden -> d without biases, initialised from `seed`."""

    def __init__(self, dim: int, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.down, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        query: Tensor = self.norm(nn.functional.silu(self.up(self.down(x))))
        return query


@dataclass
class SAPT(IncLoRA):
    """Trains A_t, B_t, k_t and the query network; old branches and keys are frozen.

    Of every old task a fraction `share` of its inputs is stored (row numbers; labels are not used), and its mean
    weights w on validation. All stored inputs enter every step. Embeddings are frozen, so their pooled vectors are
    computed once per task.
    """

    kl_ratio: float = 0.5
    share: float = 0.02
    hidden: int = 100
    faithful_padding: bool = False

    mergeable: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = (
        "query=router.query",
        "all_keys=router.keys",
        "memory=router.memory",
        "means=router.means",
    )

    def __post_init__(self) -> None:
        require(self.kl_ratio >= 0, "method.kl_ratio", self.kl_ratio, "0 (off) or more")
        require(0 <= self.share <= 1, "method.share", self.share, "in [0, 1]")
        require(self.hidden >= 1, "method.hidden", self.hidden, "at least 1")

    def init_adapters(self) -> None:
        super().init_adapters()
        device, self.dim = self.objective.device, vocabulary(self.objective.adapters.model).shape[1]
        self.query = Query(self.dim, self.hidden, derive(self.seed, "query")).to(device)
        self.keys = [torch.empty(0, self.dim, device=device)]  # [old tasks, d], then k_t once training starts
        self.memory: dict[int, list[int]] = {}  # task -> train rows of its stored inputs
        self.means: list[Tensor] = []  # per task i: mean weights [i + 1] right after learning it
        self.pooled_memory: list[Tensor] = []  # per old task: pooled vectors [n, d] of its stored inputs

    def add_branch(self, index: int) -> None:
        super().add_branch(index)
        generator = torch.Generator().manual_seed(derive(self.seed, "key", index))
        key = torch.rand(1, self.dim, generator=generator) * 2 - 1
        self.keys = [torch.cat(self.keys).detach(), nn.Parameter(key.to(self.objective.device))]

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        distils = self.kl_ratio and self.share
        stored = self.memory.values() if distils else ()
        self.pooled_memory = [self.pooled(self.data.train, np.array(rows)) for rows in stored]
        super().learn(task, index, trainer)

    @property
    def all_keys(self) -> Tensor:
        """[tasks, d]: all keys. Assigned keys are frozen but for the last one."""
        return torch.cat(self.keys).detach()

    @all_keys.setter
    def all_keys(self, keys: Tensor) -> None:
        self.keys = [keys[:-1], nn.Parameter(keys[-1:])]

    def pool(self, batch: Batch) -> Tensor:
        """[batch, dim]: the elementwise maximum of the token embeddings."""
        mask = torch.ones_like(batch.attention_mask) if self.faithful_padding else batch.attention_mask
        return max_pool(token_embeddings(self.objective.adapters.model, batch), mask)

    def pooled(self, pool: EncodedDataset, rows: np.ndarray) -> Tensor:
        """[n, dim]: `pool` of rows, longest first."""
        batches = pool.by_length(rows, self.objective.eval_batch_size)
        return torch.cat([self.pool(pool.batch(batch, self.objective.device)) for batch in batches])

    def scores(self, pooled: Tensor) -> Tensor:
        """[batch, n]: k_i . x' / sqrt(d)."""
        return scores(self.query(pooled), torch.cat(self.keys))

    def route(self, batch: Batch) -> Tensor:
        return self.scores(self.pool(batch)).softmax(1)

    def step_loss(self, context: StepContext) -> Tensor | None:
        terms = [
            self.kl_ratio * divergence(mean, self.scores(pooled))
            for mean, pooled in zip(self.means, self.pooled_memory, strict=False)
        ]
        return sum(terms[1:], terms[0]) if terms else None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        query = {f"query.{name}": value for name, value in self.query.named_parameters()}
        key = {f"key{len(self.means)}": value for value in self.keys if isinstance(value, nn.Parameter)}
        return {**super().named_parameters(), **query, **key}

    def after_task(self, task: Task, index: int) -> None:
        super().after_task(task, index)
        rows, rng = self.data.train.rows_of(index), self.replay.rng(index, "inputs")
        self.memory[index] = stratified_sample(self.data.train.labels, rows, self.share, rng).tolist()
        pool = self.data.validation if len(self.data.validation.rows_of(index)) else self.data.train
        with torch.no_grad():
            self.means.append(self.scores(self.pooled(pool, pool.rows_of(index))).softmax(1).mean(0))

    def stored_rows(self) -> np.ndarray:
        """Also its own stored inputs, whose labels are not used."""
        arrays = [np.array(rows, np.int64) for rows in self.memory.values()]
        return np.concatenate([super().stored_rows(), *arrays])


def scores(x: Tensor, keys: Tensor) -> Tensor:
    """[batch, n]: k_i . x / sqrt(d)."""
    similarity: Tensor = x @ keys.T / keys.shape[1] ** 0.5
    return similarity


def divergence(mean: Tensor, scores: Tensor) -> Tensor:
    """KL(mean || softmax(scores)) averaged over the batch; `mean` is 0 for branches added since, with 0 log 0 = 0."""
    target = nn.functional.pad(mean, (0, scores.shape[1] - len(mean)))
    return (torch.xlogy(target, target) - target * scores.log_softmax(1)).sum(1).mean()
