"""A-GEM: projects gradients that conflict with the memory's gradient (Chaudhry et al., 2019, arXiv 1812.00420)."""

from dataclasses import dataclass

import torch

from clpet.config.seeding import derive
from clpet.methods.replay import Replay
from clpet.replay.batch_plan import BatchPlan
from clpet.training.step import StepContext


@dataclass
class AGEM(Replay):
    """g <- g - (g . g_ref / g_ref . g_ref) g_ref if g . g_ref < 0, with g_ref of a batch of the memory (equation 11)."""

    memory_batch: int = 16

    def plan(self, index: int) -> BatchPlan:
        """Trains on new examples alone; the memory only restricts the direction."""
        return self.replay.new_only_plan(index)

    def adjust_gradients(self, context: StepContext) -> None:
        if not self.replay.memory:
            return
        rows = self.replay.memory_rows()
        purpose = "a_gem", context.task, context.epoch, context.step  # a resumed run draws the same examples
        generator = torch.Generator().manual_seed(derive(self.seed, *purpose))
        drawn = rows[torch.randint(len(rows), (self.memory_batch,), generator=generator).numpy()]
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        loss = self.objective.loss(self.data.train.batch(drawn, self.objective.device))
        reference = torch.autograd.grad(loss, parameters, materialize_grads=True)
        gradients = [parameter.grad for parameter in parameters]
        product = sum((g * r).sum() for g, r in zip(gradients, reference, strict=True))
        norm = sum(r.square().sum() for r in reference)
        scale = torch.where(product < 0, product / norm, 0.0)  # on the device: no synchronisation
        for g, r in zip(gradients, reference, strict=True):
            g -= scale * r
