"""SD-LoRA: learned directions are frozen, and their lengths are trained further (Wu et al., 2025, arXiv 2501.13198).

    h = W x + s (sum_{i < t} a_i D_i x + a_t B_t A_t x),   D_i = B_i A_i / n_i
where A_t, B_t and all a are trained; a, without weight decay, is the same number in all layers. When a task is over,
by `restart`,
    false  a_i <- a_i n_i with n_i the root mean square over the layers of |B_i| |A_i|: the function does not change
    true   n_i = |B_i| |A_i| in every layer, and every a starts again, as in the published code
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.batches import Batch
from clpet.methods.inc_lora import IncLoRA
from clpet.training.optimizers import Undecayed


@dataclass
class SDLoRA(IncLoRA):
    """The softmax of the loss is over the labels of the task, as for all methods without replay."""

    start: float = 0.8
    restart: bool = False

    saved: ClassVar[tuple[str, ...]] = ("lengths",)

    def __post_init__(self) -> None:
        require(self.start != 0, "method.start", self.start, "other than 0")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.lengths: nn.Parameter = Undecayed(torch.empty(0, device=self.objective.device))  # a [branches]

    def add_branch(self, index: int) -> None:
        if self.stack.branches:
            self.freeze_direction()
        super().add_branch(index)
        old = self.lengths.detach()
        new = torch.full((len(old) + 1 if self.restart else 1,), self.start, device=old.device)
        self.lengths = Undecayed(new if self.restart else torch.cat([old, new]))

    @torch.no_grad()
    def freeze_direction(self) -> None:
        """Divides the newest branch by its length, which goes into a."""
        layers = list(self.stack.layers.values())
        norms = torch.stack([layer.A.norm() * layer.B.norm() for layer in layers])
        divisors = norms if self.restart else norms.square().mean().sqrt().expand_as(norms)
        for layer, divisor in zip(layers, torch.where(divisors > 0, divisors, 1), strict=True):
            layer.B.div_(divisor)
        if not self.restart:
            self.lengths[-1] *= divisors[0]

    def route(self, batch: Batch) -> Tensor | None:
        return self.lengths

    def answering(self) -> contextlib.AbstractContextManager[object]:
        return self.stack.branch_weights(self.lengths if self.stack.branches else None)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().named_parameters(), f"lengths{len(self.lengths)}": self.lengths}

    def save(self, folder: Path) -> None:
        """Writes each branch as a separate LoRA, and their lengths."""
        super().save(folder)
        save_file({"lengths": self.lengths.detach().cpu()}, folder / "lengths.safetensors")

    @torch.no_grad()
    def merged(self) -> nn.Module:
        factors = self.lengths.repeat_interleave(self.stack.rank)
        for layer in self.stack.layers.values():
            A, B = layer.all()
            layer.set(A[:0], B[:, :0], A, B * factors)
        return super().merged()
