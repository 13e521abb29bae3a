"""DTKR of SLM (arXiv 2404.07470): keys are learned on sentence embeddings, and an input retrieves the nearest ones.

A query is an embedding of G h numbers cut into G chunks, [batch, G, h]. The P keys that a task has in every group
are [G, P, h]; those of T tasks are concatenated to [G, N, h] with N = T P. Similarity is the cosine of chunk and key.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require

EPS = 1e-9  # added to the denominator of the weights
MIN_TOTAL = 1e-6  # if the similarities of the chosen keys sum up to at most this, their weights are uniform


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """[batch, G, N]: cosine of every chunk [batch, G, h] with every key [G, N, h] of its group."""
    return torch.einsum("bgh,gnh->bgn", F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))


# Stage 1


@dataclass
class KeyLearning:
    """Stage 1, L = -mean cos(q_bg, k_gi) over items b, groups g and the `top_k` most similar remaining keys i.

    For every item and group a key is dropped with probability `dropout`; a dropped key cannot be chosen and gets no
    gradient. Without this a few keys win all items. Small tasks are repeated until at least `min_steps` steps are
    done. After the fraction `decay_at` of the epochs the learning rate is divided by 10.
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
        for option in ("top_k", "epochs", "batch_size"):
            require(getattr(self, option) >= 1, f"method.stage1.{option}", getattr(self, option), "at least 1")
        for option in ("lr", "weight_decay", "clip", "min_steps"):
            require(getattr(self, option) >= 0, f"method.stage1.{option}", getattr(self, option), "0 or more")
        require(0 < self.decay_at <= 1, "method.stage1.decay_at", self.decay_at, "in (0, 1]")
        require(0 <= self.dropout < 1, "method.stage1.dropout", self.dropout, "in [0, 1)")

    def length(self, examples: int) -> tuple[int, int]:
        """(epochs, optimiser steps per epoch) for a task with this many examples."""
        steps = -(-examples // self.batch_size)
        return max(self.epochs, -(-self.min_steps // steps)), steps

    def loss(self, queries: Tensor, keys: Tensor, draws: Tensor) -> Tensor:
        """L of a batch; `draws` [batch, G, P] are uniform in [0, 1), a key with a draw below `dropout` is dropped."""
        return key_loss(cosines(queries, keys), self.top_k, draws < self.dropout)

    def learn(
        self, queries: Tensor, keys: Tensor, seed: int, step: Callable[[int, int, int, Tensor], None], dry_run: bool
    ) -> Tensor:
        """Trains `keys` [G, P, h] on `queries` [n, G, h] and returns them.

        `step` reports progress (see Progress.step); `dry_run` stops after one optimiser step.
        """
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
                if dry_run:
                    return keys.detach()
                step(epoch, number, min(number * self.batch_size, len(queries)), total / number)
        return keys.detach()


def orthonormal(groups: int, count: int, width: int, seed: int) -> Tensor:
    """Initial keys [groups, count, width], orthonormal within each group; needs count <= width."""
    assert count <= width
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([nn.init.orthogonal_(torch.empty(count, width), generator=generator) for _ in range(groups)])


def key_loss(sigma: Tensor, top_k: int, dropped: Tensor) -> Tensor:
    """Minus the mean over items and groups of the mean of their `top_k` largest similarities that are not `dropped`.

    sigma, dropped: [batch, G, P]. If fewer than `top_k` keys remain, their mean is taken; an item and group without
    any remaining key is excluded.
    """
    top = sigma.detach().masked_fill(dropped, float("-inf")).topk(top_k, -1)
    chosen = torch.zeros_like(sigma).scatter(-1, top.indices, top.values.isfinite().to(sigma.dtype))
    count = chosen.sum(-1)
    mean = (sigma * chosen).sum(-1) / count.clamp(min=1)
    return -mean.sum() / (count > 0).sum().clamp(min=1)


# Stage 2 and test


@dataclass
class Mixture:
    """Retrieved keys: weights [batch, G', N] of their values, 0 if not chosen, and picks [batch, G', K], -1 for none.

    G' is 1 if the groups share their values, else G.
    """

    weights: Tensor
    picks: Tensor

    def branches(self, per_task: int) -> Tensor:
        """[batch, T G' P]: the weights of the values, ordered by task and within a task by group."""
        weights: Tensor = self.weights.unflatten(2, (-1, per_task))
        return weights.transpose(1, 2).flatten(1)

    def owners(self, per_task: int) -> Tensor:
        """[batch, G' K]: the task of each picked key, -1 if no key was picked (-1 // P stays -1)."""
        return self.picks.div(per_task, rounding_mode="floor").flatten(1)


def over_groups(sigma: Tensor) -> Tensor:
    """[batch, 1, N]: the mean over groups.

    Summing in a loop fixes the order of additions; the order inside `mean` depends on the number of keys, so results
    would change in the last bit as tasks are added.
    """
    total = sigma[:, 0]
    for group in range(1, sigma.shape[1]):
        total = total + sigma[:, group]
    return total[:, None] / sigma.shape[1]


def retrieve(
    sigma: Tensor, top_k: int, per_group: bool = False, uniform: bool = False, batch_mean: bool = False,
    allowed: Tensor | None = None,
) -> Mixture:  # fmt: skip
    """Chooses the `top_k` most similar keys and weights their values, w_i = s_i / sum_j s_j over the chosen keys.

    sigma [batch, G, N]: similarities, averaged over groups unless `per_group`.
    uniform: equal weights, which are also used if the chosen similarities sum up to about 0.
    batch_mean: averages similarities over the batch, which then has one common mixture.
    allowed [batch, N]: keys that may be chosen; the weights of an item without any are all 0.
    """
    size, sigma = len(sigma), sigma if per_group else over_groups(sigma)
    allowed = sigma.new_ones(size, sigma.shape[2], dtype=torch.bool) if allowed is None else allowed
    if batch_mean:
        sigma, allowed = sigma.mean(0, keepdim=True), allowed.all(0, keepdim=True)
    top = sigma.masked_fill(~allowed[:, None], float("-inf")).topk(top_k, -1)
    valid = top.values.isfinite()  # fewer than top_k keys may be allowed
    values = top.values.masked_fill(~valid, 0)
    total, equal = values.sum((1, 2), keepdim=True), 1 / (top_k * sigma.shape[1])
    ratio = values / (total + EPS)
    ratio = torch.full_like(values, equal) if uniform else torch.where(total <= MIN_TOTAL, equal, ratio)
    weights = torch.zeros_like(sigma).scatter(-1, top.indices, ratio * valid)
    picks = top.indices.masked_fill(~valid, -1)
    return Mixture(weights.expand(size, -1, -1), picks.expand(size, -1, -1))


def num_uniform(sigma: Tensor, top_k: int, per_group: bool) -> int:
    """Number of items whose chosen similarities sum up to about 0, so that their weights are uniform."""
    sigma = sigma if per_group else over_groups(sigma)
    return int((sigma.topk(top_k, -1).values.sum((1, 2)) <= MIN_TOTAL).sum())


def majority(owners: Tensor, tasks: int) -> Tensor:
    """[batch]: the task that owns more than half of an item's picks, given their owners [batch, picks]; -1 if none."""
    counts = F.one_hot(owners.clamp(min=0), tasks).mul((owners >= 0)[..., None]).sum(1)
    most, task = counts.max(1)
    return torch.where(2 * most > owners.shape[1], task, -1)


class RetrievalStats:
    """Counts of what the texts of every task retrieved.

    votes [tasks, tasks + 1]: texts of a task (row) by the task that owns the majority of their keys (column); the last
    column counts texts without a majority. right [tasks]: sum over texts of the fraction of keys of their own task.
    """

    def __init__(self, tasks: int, device: torch.device | str = "cpu") -> None:
        self.votes = torch.zeros(tasks, tasks + 1, dtype=torch.float64, device=device)
        self.right = torch.zeros(tasks, dtype=torch.float64, device=device)

    def add(self, tasks: Tensor, selected: Tensor, right: Tensor) -> None:
        """Adds a batch: tasks of the texts, tasks with the majority of picks or -1, fractions of right picks."""
        self.votes.index_put_((tasks, selected), torch.ones_like(right, dtype=torch.float64), accumulate=True)
        self.right.index_add_(0, tasks, right.double())

    def figures(self, names: list[str]) -> dict[str, float]:
        """Per task named, in percent: texts whose majority of picks is right (vote/), and right picks (picks/)."""
        votes, right, count = self.votes.cpu(), self.right.cpu(), self.votes.sum(1).cpu()
        majorities = {f"vote/{name}": 100 * float(votes[i, i] / count[i]) for i, name in enumerate(names)}
        picks = {f"picks/{name}": 100 * float(right[i] / count[i]) for i, name in enumerate(names)}
        return {"right_picks": sum(picks.values()) / len(picks), **majorities, **picks}

    def state(self) -> dict[str, Tensor]:
        """Both counts; keys are part of the checkpoint format."""
        return {"votes": self.votes, "right": self.right}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned, also of a run with fewer tasks."""
        count, votes = len(state["right"]), state["votes"].to(self.votes.device)
        # New tensors: those of an evaluation belong to its inference mode and cannot be changed outside of it.
        self.votes, self.right = (value.new_zeros(value.shape) for value in (self.votes, self.right))
        self.votes[:count, :count], self.votes[:count, -1] = votes[:, :-1], votes[:, -1]
        self.right[:count] = state["right"]
