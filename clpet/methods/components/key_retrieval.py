"""DTKR: keys learned on sentence embeddings, and how similar keys share out an input (SLM, arXiv 2404.07470).

A query is an embedding of G h numbers cut into G chunks, [batch, G, h]; a task's keys are [G, P, h], those of
several tasks stand side by side, [G, N, h] with N = T P. Similarity is the cosine of chunk and key.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require

EPS = 1e-9  # of the ratio of similarities
UNRELATED = 1e-6  # a sum of similarities up to this is shared out evenly


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """[batch, G, N]: cosine of every chunk [batch, G, h] with every key [G, N, h] of its group."""
    return torch.einsum("bgh,gnh->bgn", F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))


# Stage 1


@dataclass
class KeyLearning:
    """L = -mean cos(q_bg, k_gi) over items b, groups g and the `top_k` most similar keys i that were not dropped.

    A key is dropped for an item and group with chance `dropout`, so that none wins everything; who was dropped is
    not chosen and gets no gradient. Few texts are gone through until there were `min_steps`; after the share
    `decay_at` of the epochs the learning rate is a tenth.
    """

    top_k: int = 2
    dropout: float = 0.2
    epochs: int = 3
    min_steps: int = 500
    lr: float = 1e-3
    batch_size: int = 16
    decay_at: float = 0.67
    weight_decay: float = 0.01
    clip: float = 0.1

    def __post_init__(self) -> None:
        for knob in ("top_k", "epochs", "batch_size"):
            require(getattr(self, knob) >= 1, f"method.stage1.{knob}", getattr(self, knob), "at least 1")
        for knob in ("lr", "weight_decay", "clip", "min_steps"):
            require(getattr(self, knob) >= 0, f"method.stage1.{knob}", getattr(self, knob), "0 or more")
        require(0 < self.decay_at <= 1, "method.stage1.decay_at", self.decay_at, "in (0, 1]")
        require(0 <= self.dropout < 1, "method.stage1.dropout", self.dropout, "in [0, 1)")

    def length(self, examples: int) -> tuple[int, int]:
        """(epochs, optimiser steps of an epoch)."""
        steps = -(-examples // self.batch_size)
        return max(self.epochs, -(-self.min_steps // steps)), steps

    def loss(self, queries: Tensor, keys: Tensor, draws: Tensor) -> Tensor:
        """L of a batch; `draws` [batch, G, P] in [0, 1) say which keys are dropped."""
        return key_loss(cosines(queries, keys), self.top_k, draws < self.dropout)

    def learn(
        self, queries: Tensor, keys: Tensor, seed: int, step: Callable[[int, int, int, Tensor], None], trial: bool
    ) -> Tensor:
        """The keys [G, P, h] after all epochs over the queries [n, G, h]; `step` is a Progress's, `trial` one step."""
        generator = torch.Generator().manual_seed(seed)
        keys = nn.Parameter(keys.clone())
        optimizer = torch.optim.AdamW([keys], lr=self.lr, weight_decay=self.weight_decay, fused=True)
        epochs, _ = self.length(len(queries))
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = self.lr * (0.1 if epoch >= round(self.decay_at * epochs) else 1)
            total = torch.zeros((), device=keys.device)
            order = torch.randperm(len(queries), generator=generator).to(queries.device)
            for number, rows in enumerate(order.split(self.batch_size), start=1):
                draws = torch.rand(len(rows), *keys.shape[:2], generator=generator).to(keys.device, non_blocking=True)
                loss = self.loss(queries[rows], keys, draws)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if self.clip:
                    nn.utils.clip_grad_norm_([keys], self.clip)
                optimizer.step()
                total += loss.detach()
                if trial:
                    return keys.detach()
                step(epoch, number, min(number * self.batch_size, len(queries)), total / number)
        return keys.detach()


def orthonormal(groups: int, count: int, width: int, seed: int) -> Tensor:
    """[groups, count, width]: first keys, in every group of norm 1 and at right angles to each other."""
    assert count <= width
    generator = torch.Generator().manual_seed(seed)
    parts = [nn.init.orthogonal_(torch.empty(count, width), generator=generator) for _ in range(groups)]
    return torch.stack(parts)


def key_loss(sigma: Tensor, top_k: int, dropped: Tensor) -> Tensor:
    """-mean over items and groups of the mean of the `top_k` largest similarities [batch, G, P] not `dropped`.

    Where fewer are left they are the mean; an item and group with none is no part of the mean.
    """
    top = sigma.detach().masked_fill(dropped, float("-inf")).topk(top_k, -1)
    chosen = torch.zeros_like(sigma).scatter(-1, top.indices, top.values.isfinite().to(sigma.dtype))
    count = chosen.sum(-1)
    mean = (sigma * chosen).sum(-1) / count.clamp(min=1)
    return -mean.sum() / (count > 0).sum().clamp(min=1)


# Stage 2 and test


@dataclass
class Mixture:
    """weights [batch, G', N] of the values, zero where they were not chosen; picks [batch, G', K] of keys, -1: none.

    G' is 1 where the groups share their values, else G.
    """

    weights: Tensor
    picks: Tensor

    def branches(self, per_task: int) -> Tensor:
        """[batch, T G' P]: the weights of the values task by task, and in a task group by group."""
        return self.weights.unflatten(2, (-1, per_task)).transpose(1, 2).flatten(1)

    def owners(self, per_task: int) -> Tensor:
        """[batch, G' K]: the task each picked key belongs to, -1 where no key was picked."""
        return self.picks.div(per_task, rounding_mode="floor").flatten(1)


def over_groups(sigma: Tensor) -> Tensor:
    """[batch, 1, N]: the mean over groups, in an order that does not depend on how many keys there are."""
    total = sigma[:, 0]
    for group in range(1, sigma.shape[1]):
        total = total + sigma[:, group]
    return total[:, None] / sigma.shape[1]


def retrieve(
    sigma: Tensor, top_k: int, per_group: bool = False, uniform: bool = False, batch_mean: bool = False,
    allowed: Tensor | None = None,
) -> Mixture:  # fmt: skip
    """The `top_k` most similar keys, weighed by their share of the chosen similarities (or with `uniform`, equally).

    sigma [batch, G, N]: similarities. Without `per_group` they are averaged over groups first; `batch_mean`, over the
    batch, which then has one mixture. `allowed` [batch, N] are keys that may be chosen; an item without any has no
    weights. Similarities that sum up to nothing are shared out evenly.
    """
    size, sigma = len(sigma), sigma if per_group else over_groups(sigma)
    allowed = sigma.new_ones(size, sigma.shape[2], dtype=torch.bool) if allowed is None else allowed
    if batch_mean:
        sigma, allowed = sigma.mean(0, keepdim=True), allowed.all(0, keepdim=True)
    top = sigma.masked_fill(~allowed[:, None], float("-inf")).topk(top_k, -1)
    some = top.values.isfinite()
    values = top.values.masked_fill(~some, 0)
    total, share = values.sum((1, 2), keepdim=True), 1 / (top_k * sigma.shape[1])
    ratio = (
        torch.full_like(values, share) if uniform else torch.where(total <= UNRELATED, share, values / (total + EPS))
    )
    weights = torch.zeros_like(sigma).scatter(-1, top.indices, ratio * some)
    picks = top.indices.masked_fill(~some, -1)
    return Mixture(weights.expand(size, -1, -1), picks.expand(size, -1, -1))


def unrelated(sigma: Tensor, top_k: int, per_group: bool) -> int:
    """How many items' chosen similarities sum up to nothing."""
    sigma = sigma if per_group else over_groups(sigma)
    return int((sigma.topk(top_k, -1).values.sum((1, 2)) <= UNRELATED).sum())


def majority(owners: Tensor, tasks: int) -> Tensor:
    """[batch]: the task that owns more than half of an item's picks [batch, picks]; -1: none does."""
    shares = F.one_hot(owners.clamp(min=0), tasks).mul((owners >= 0)[..., None]).sum(1)
    most, task = shares.max(1)
    return torch.where(2 * most > owners.shape[1], task, -1)


class RetrievalStats:
    """What was retrieved for the texts of every task: votes [tasks, tasks + 1], last where no task had a majority."""

    def __init__(self, tasks: int, device: torch.device | str = "cpu") -> None:
        self.votes = torch.zeros(tasks, tasks + 1, dtype=torch.float64, device=device)
        self.right = torch.zeros(tasks, dtype=torch.float64, device=device)  # sum of the shares of right picks

    def add(self, tasks: Tensor, selected: Tensor, right: Tensor) -> None:
        """A batch: the tasks of its texts, the task with most picks or -1, and the share of right picks."""
        self.votes.index_put_((tasks, selected), torch.ones_like(right, dtype=torch.float64), accumulate=True)
        self.right.index_add_(0, tasks, right.double())

    def figures(self, names: list[str]) -> dict[str, float]:
        """Percent of the first tasks' texts with a majority of right picks, and of right picks."""
        votes, right, count = self.votes.cpu(), self.right.cpu(), self.votes.sum(1).cpu()
        found = {f"vote/{name}": 100 * float(votes[i, i] / count[i]) for i, name in enumerate(names)}
        picks = {f"picks/{name}": 100 * float(right[i] / count[i]) for i, name in enumerate(names)}
        return {"right_picks": sum(picks.values()) / len(picks), **found, **picks}

    def state(self) -> dict[str, Tensor]:
        """Both counts."""
        return {"votes": self.votes, "right": self.right}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.votes.copy_(state["votes"])
        self.right.copy_(state["right"])
