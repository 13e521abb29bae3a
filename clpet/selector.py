"""The selector of dynamic ConPET: an adapter and a head over task numbers, which rank the modules for an input."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config import derive
from clpet.logits import LogitStore
from clpet.mixing import Plan
from clpet.objectives.classification import Classification
from clpet.text import Batch, EncodedDataset
from clpet.training import Trainer

NAME = "selector"


class Selector:
    """{LoRA_sel, head_sel}: L_sel = -(1/B) sum_i log softmax(head_sel(h_sel(x_i)))[task(y_i)].

    Its scores of an example are computed once between two of its trainings and kept in `store`.
    """

    def __init__(self, objective: Classification, store: LogitStore, tasks: list[str], seed: int) -> None:
        self.objective, self.store, self.seed = objective, store, seed
        self.head = objective.new_head(seed, [f"task {name}" for name in tasks])
        self.head.grow([0])

    @property
    def learned(self) -> bool:
        """Whether there is an adapter yet: the first task needs none."""
        return NAME in self.objective.adapters.names

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter and the head."""
        return {**self.objective.adapters.tensors(NAME), **dict(self.head.named_parameters())}

    def learn(self, trainer: Trainer, index: int, plan: Plan, clip: float, validate: Callable[[], float]) -> None:
        """Task `index`: old rows of the head and LoRA_sel go on from where they are; row `index` starts fresh."""
        adapters = self.objective.adapters
        if not self.learned:
            adapters.add(NAME, derive(self.seed, "adapter", NAME))
        adapters.activate(NAME, train=True)
        self.head.grow([index])
        trainer.fit(plan, self.loss, self.named_parameters(), stage=NAME, clip=clip, validate=validate)
        self.freeze()

    def freeze(self) -> None:
        """Scores asked for from now on are those of the weights as they are."""
        self.store.freeze(NAME, self.head.weight, self.head.bias)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over task numbers."""
        return F.cross_entropy(self.head(self.objective.features(batch)), batch.tasks)

    def right(self, batch: Batch) -> Tensor:
        """[batch]: whether an example goes to its own task."""
        return self.head(self.objective.features(batch)).argmax(1) == batch.tasks

    def look_up(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Has the scores computed where `ranking` will ask for them."""
        self.store.fill(NAME, pool, rows)

    def ranking(self, pool: EncodedDataset, rows: np.ndarray, count: int) -> np.ndarray:
        """[len(rows), count]: task numbers by falling score."""
        scores = torch.from_numpy(self.store.get(NAME, pool, rows))
        return scores.topk(count, dim=1).indices.numpy()
