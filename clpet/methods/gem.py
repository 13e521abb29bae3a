"""GEM: a gradient that conflicts with no old task's (Lopez-Paz and Ranzato, 2017, arXiv 1706.08840).

With m_k the gradient of old task k on all of its memory, M their rows and g that of a batch, if some m_k . g < 0:
    g <- g + M^T v,   v = argmin v^T (M M^T + e I) v / 2 + (M g)^T v   subject to v >= margin
over all trained tensors together. margin = 0 is the projection; the published code has margin 0.5. The optimiser then
gets g; only with SGD is the step itself free of conflict.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from clpet.config.schema import require
from clpet.errors import need_package
from clpet.methods.components.memory_gradient import dot, dual_weights, memory_gradient
from clpet.methods.replay import DrawnReplay
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.runtime.sharding.gradients import local_gradients
from clpet.training.step import StepContext


class RidgeScale(Enum):
    """Unit of the ridge: the mean square norm of the old gradients, or 1."""

    relative = "relative"
    absolute = "absolute"


@dataclass
class GEM(DrawnReplay):
    """Every step computes the gradients of all memories: its cost grows with the number of old tasks.

    The quadratic problem is solved on the CPU, so every step waits for the device.
    """

    margin: float = 0.0
    ridge: float = 1e-3
    ridge_scale: RidgeScale = RidgeScale.relative

    def __post_init__(self) -> None:
        require(self.margin >= 0, "method.margin", self.margin, "0 or more")
        require(self.ridge > 0, "method.ridge", self.ridge, "more than 0")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        need_package("scipy", "sklearn", f"method={self.name}")

    def adjust_gradients(self, context: StepContext) -> None:
        if not self.replay.memory:
            return
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        gradient = local_gradients(parameters)
        references = [memory_gradient(self, rows, parameters) for rows in self.memories()]
        products = (
            torch.stack([dot(gradient, reference, parameters) for reference in references]).double().cpu().numpy()
        )
        if not np.isfinite(products).all() or (products >= 0).all():  # train.on_nan deals with what is not finite
            return
        pairs = torch.stack([torch.stack([dot(one, two, parameters) for two in references]) for one in references])
        for weight, reference in zip(self.weights(products, pairs.double().cpu().numpy()), references, strict=True):
            torch._foreach_add_(gradient, reference, alpha=float(weight))

    def memories(self) -> list[np.ndarray]:
        """The stored train rows of every old task."""
        rows = self.replay.memory_rows()
        return [rows[self.data.train.tasks[rows] == task] for task in np.unique(self.data.train.tasks[rows])]

    def weights(self, products: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """v, from M g and M M^T. Gradients of 0 everywhere leave g as it is."""
        scale = float(np.diag(gram).mean()) if self.ridge_scale is RidgeScale.relative else 1.0
        return dual_weights(products, gram, self.margin, self.ridge * scale) if scale > 0 else np.zeros_like(products)
