"""BiC: two numbers per task correct the logits of its labels, on held-out examples (Wu et al., 2019, arXiv 1905.13260).

Training is that of WA, without some examples of every label. After a task t >= 2, on these held-out ones, with as many
of every new label as of an old one,
    z_new <- a z_new + b,   (a, b) = argmin CE + 0.01 ((a - 1)^2 + b^2)   subject to a >= 0.001
The correction is then part of the head: the rows of the new labels become a w and a bias + b.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.seeding import derive
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.wa import CorrectedReplay
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.objectives.classification import Classification
from clpet.replay.base import NoReplay
from clpet.replay.exemplar import FixedReplay
from clpet.training.trainer import Trainer

SMALLEST = 1e-3  # of a
RIDGE = 0.01  # weight of (a - 1)^2 + b^2: on few held-out examples that are all right, a would grow without a limit


@dataclass
class BiC(CorrectedReplay):
    """The held-out examples of old labels are those that replay=fixed stores for validation."""

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay != "fixed":
            raise ConfigError(f"method={self.name} needs held-out examples of every label: set replay=fixed")

    def setup(
        self, objective: Classification, benchmark: Benchmark, data: Encoded, replay: NoReplay, seed: int
    ) -> None:
        assert isinstance(replay, FixedReplay)
        self.per_label = replay.per_class - max(1, round(replay.train_share * replay.per_class))
        if self.per_label < 2:
            raise ConfigError(
                f"method={self.name} needs 2 held-out examples of every label: replay.per_class={replay.per_class} and "
                f"replay.train_share={replay.train_share} leave {self.per_label}"
            )
        super().setup(objective, benchmark, data, replay, seed)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.index = index
        self.replay.held_out = self.held_out_rows(index) if index else np.empty(0, dtype=np.int64)
        super().learn(task, index, trainer)

    def held_out_rows(self, index: int) -> np.ndarray:
        """Train rows of the task that correct it: `per_label` of every label, but at most half of its rows."""
        pool, rng = self.data.train, np.random.default_rng(derive(self.seed, "bic", index))
        rows = pool.rows_of(index)
        of_labels = [rows[pool.labels[rows] == label] for label in np.unique(pool.labels[rows])]
        drawn = [rng.choice(of_label, min(self.per_label, len(of_label) // 2), replace=False) for of_label in of_labels]
        return np.sort(np.concatenate(drawn))

    def correct(self) -> dict[str, float]:
        """Fits a and b on the held-out examples and changes the head."""
        assert isinstance(self.replay, FixedReplay)
        memory = [rows for task, rows in self.replay.val_memory.items() if task < self.index]
        rows = np.concatenate([*memory, self.replay.held_out])
        logits, head = self.embed(rows, self.logits), self.objective.head
        targets = head.columns(torch.from_numpy(self.data.train.labels[rows]).to(logits.device))
        with torch.enable_grad():
            a, b = fit_correction(logits, targets, self.old, RIDGE)
        head.weight[self.old :] *= a
        head.bias[self.old :] = a * head.bias[self.old :] + b
        return {"correction_a": a, "correction_b": b}


def fit_correction(
    logits: Tensor, targets: Tensor, old: int, ridge: float = 0.0, smallest: float = SMALLEST
) -> tuple[float, float]:
    """(a, b) that minimise the cross-entropy with a z + b for the columns from `old` on, subject to a >= `smallest`.

    `ridge` (a - 1)^2 + `ridge` b^2 is added, which is not in the paper.
    The problem is convex, so where its solution violates the bound, that with a at the bound is the constrained one.
    """
    values, targets = logits.detach().double().cpu(), targets.cpu()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        corrected = torch.cat([values[:, :old], a * values[:, old:] + b], 1)
        return F.cross_entropy(corrected, targets) + ridge * ((a - 1).square() + b.square())

    one, bound = torch.ones((), dtype=torch.float64), torch.tensor(smallest, dtype=torch.float64)
    a, b = minimum(lambda free: loss(free[0], free[1]), torch.stack([one, 0 * one])).tolist()
    if a >= smallest:
        return a, b
    return smallest, float(minimum(lambda free: loss(bound, free[0]), torch.zeros(1, dtype=torch.float64)))


def minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimum of a convex function of a vector, by L-BFGS."""
    point = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        solver.zero_grad()
        value = function(point)
        value.backward()
        return value.item()

    solver.step(closure)
    return point.detach()
