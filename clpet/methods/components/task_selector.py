"""Selectors of dynamic ConPET (arXiv 2309.14763): rank the modules for an input, by a trained head or class means."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset
from clpet.methods.components.logit_cache import BARE, LogitCache
from clpet.objectives.base import HeadState
from clpet.objectives.classification import Classification
from clpet.replay.batch_plan import BatchPlan
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

NAME = "selector"


class Selector:
    """{LoRA_sel, head_sel}: L_sel = -(1/B) sum_i log softmax(head_sel(h_sel(x_i)))[task(y_i)].

    Its scores are stored in `cache`: between two trainings of the selector each is computed once.
    """

    def __init__(self, objective: Classification, cache: LogitCache, tasks: list[str], seed: int) -> None:
        self.objective, self.cache, self.seed = objective, cache, seed
        self.head = objective.new_head(seed, [f"task {name}" for name in tasks])
        self.head.grow([0])

    def count(self) -> int:
        """Number of scalars in the head."""
        return sum(p.numel() for p in self.head.parameters())

    @property
    def learned(self) -> bool:
        """Whether the selector has an adapter yet; the first task does not need one."""
        return NAME in self.objective.adapters.names

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the adapter and the head."""
        return {**self.objective.adapters.tensors(NAME), **dict(self.head.named_parameters())}

    def learn(self, trainer: Trainer, index: int, plan: BatchPlan, clip: float, validate: Callable[[], float]) -> None:
        """Trains on task `index`: LoRA_sel and the old rows of the head continue, row `index` is new."""
        adapters = self.objective.adapters
        if not self.learned:
            adapters.add(NAME, derive(self.seed, "adapter", NAME))
        adapters.activate(NAME, train=True)
        self.head.grow([index])
        hooks = StepHooks(self.loss, validate=validate)
        trainer.fit(plan, self.named_parameters(), hooks, stage=NAME, clip=clip)
        self.freeze()

    def freeze(self) -> None:
        """Drops cached scores; later ones are computed from the present weights."""
        self.cache.freeze(NAME, self.head.weight, self.head.bias)

    def state(self) -> HeadState:
        """State of the head; the adapter is part of the objective's state."""
        return self.head.state()

    def load(self, state: HeadState) -> None:
        """Restores what `state` returned."""
        self.head.load(state)
        self.freeze()

    def loss(self, context: StepContext) -> Tensor:
        """L_sel: cross-entropy over task numbers."""
        batch = context.batch
        return F.cross_entropy(self.head(self.objective.features(batch)), batch.tasks)

    def right(self, batch: Batch) -> Tensor:
        """[batch]: whether an example's highest score is that of its own task."""
        scores: Tensor = self.head(self.objective.features(batch))
        return scores.argmax(1) == batch.tasks

    def prefetch(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Computes the scores that `ranking` will need in large blocks."""
        self.cache.prefetch(NAME, pool, rows)

    def ranking(self, pool: EncodedDataset, rows: np.ndarray, count: int) -> np.ndarray:
        """[len(rows), count]: the tasks with the highest scores, highest first."""
        scores = torch.from_numpy(self.cache.get(NAME, pool, rows))
        return scores.topk(count, dim=1).indices.numpy()


class Prototypes:
    """Ranks tasks by the class mean nearest to a text's frozen features; needs neither training nor replay.

    The score of task k is max_c cos(h(x), mean of h over the task's train examples of class c), with h of the bare
    backbone. Since |h(x)| is the same for all classes it can be left out: scores are a linear readout of h with
    W = normalised means. This is our extension; ConPET trains `Selector`.
    """

    learned = False  # has no adapter, see Selector.learned

    def __init__(self, objective: Classification, cache: LogitCache) -> None:
        self.objective, self.cache = objective, cache
        self.means: list[Tensor] = []  # per task [classes, dim], rows of norm 1

    def add(self, h: Tensor, labels: Tensor) -> None:
        """Adds the next task from features [n, dim] and labels [n] of its train examples."""
        means = torch.stack([h[labels == label].mean(0) for label in labels.unique()])
        self.means.append(F.normalize(means, dim=1))
        self.freeze()

    def freeze(self) -> None:
        """Drops cached scores; later ones are computed from the present means."""
        weight = torch.cat(self.means)
        self.cache.freeze(BARE, weight, weight.new_zeros(len(weight)))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Empty: nothing is trained."""
        return {}

    def count(self) -> int:
        """Number of stored scalars."""
        return sum(means.numel() for means in self.means)

    def prefetch(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Computes the scores that `ranking` will need in large blocks."""
        self.cache.prefetch(BARE, pool, rows)

    def ranking(self, pool: EncodedDataset, rows: np.ndarray, count: int) -> np.ndarray:
        """[len(rows), count]: the tasks with the highest scores, highest first."""
        cosines = torch.from_numpy(self.cache.get(BARE, pool, rows))  # [len(rows), classes of all tasks]
        by_task = cosines.split([len(means) for means in self.means], dim=1)
        scores = torch.stack([classes.amax(1) for classes in by_task], dim=1)
        return scores.topk(count, dim=1).indices.numpy()

    def state(self) -> dict[str, list[Tensor]]:
        """Class means of every task."""
        return {"means": self.means}

    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Restores what `state` returned."""
        self.means = [means.to(self.objective.device) for means in state["means"]]
        if self.means:
            self.freeze()
