"""A-GEM: removes from a gradient what conflicts with the memory's gradient (Chaudhry et al., 2019, arXiv 1812.00420).

With g the gradient of a batch and r that of a random batch from the memory of all old tasks (equation 11),
    g <- g - (g . r / r . r) r   if g . r < 0
over all trained tensors together. The optimiser then gets g; only with SGD is the step itself free of conflict.
"""

from dataclasses import dataclass

import torch

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.methods.components.memory_gradient import conflict, memory_gradient
from clpet.methods.replay import DrawnReplay
from clpet.runtime.sharding.gradients import local_gradients
from clpet.training.step import StepContext


@dataclass
class AGEM(DrawnReplay):
    """Trains on new examples alone; the memory only restricts the direction. The first task is plain training."""

    memory_batch: int = 64

    def __post_init__(self) -> None:
        require(self.memory_batch >= 1, "method.memory_batch", self.memory_batch, "at least 1")

    def adjust_gradients(self, context: StepContext) -> None:
        if not self.replay.memory:
            return
        rows = self.replay.memory_rows()
        purpose = "agem", context.task, context.epoch, context.step  # a resumed run draws the same examples
        generator = torch.Generator().manual_seed(derive(self.seed, *purpose))
        drawn = rows[torch.randperm(len(rows), generator=generator)[: self.memory_batch].numpy()]
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        gradient = local_gradients(parameters)
        reference = memory_gradient(self, drawn, parameters)
        scale = conflict(gradient, reference, parameters)
        for g, r in zip(gradient, reference, strict=True):
            g -= scale * r
