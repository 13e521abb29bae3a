"""LoRI: A is random and frozen, and of B only a sparse part is trained (Zhang et al., 2025, arXiv 2504.07448).

Every task is trained twice. First B densely, from 0 (first_fit=fresh) or from its present value (continued), to find
    mask = the `k` = floor((1 - sparsity) n) entries of B with the largest change, over all layers together
Then B returns to its value from before the task, and only the entries in the mask are trained. One adapter serves all
tasks; masks of different tasks may overlap unless `disjoint`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.replay import Static
from clpet.replay.batch_plan import BatchPlan
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class FirstFit(Enum):
    """The value of B from which the dense fit starts."""

    fresh = "fresh"
    continued = "continued"


@dataclass
class LoRI(Static):
    """Masked entries do not change at all: neither by gradients nor by moments or weight decay."""

    sparsity: float = 0.9
    first_fit: FirstFit = FirstFit.fresh
    disjoint: bool = False

    uses_replay: ClassVar[bool] = True
    supported_pefts: ClassVar[tuple[str, ...]] = ("lora",)
    saved_uncounted: ClassVar[tuple[str, ...]] = ("used",)  # bits, which are not parameters

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "method.sparsity", self.sparsity, "in [0, 1)")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.used: dict[str, Tensor] = {}  # disjoint: entries in the mask of an earlier task
        self.mask: dict[str, Tensor] = {}

    def factors(self) -> dict[str, nn.Parameter]:
        """B of every layer."""
        adapter = self.objective.adapters.tensors("default")
        return {name: value for name, value in adapter.items() if ".lora_B." in name}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**self.factors(), **self.objective.parameters()}

    def stages(self, index: int) -> dict[str, BatchPlan]:
        return {stage: self.replay.plan(index, stage) for stage in ("dense", "sparse")}

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.grow_head(index)
        for name, value in self.objective.adapters.tensors("default").items():
            value.requires_grad_(".lora_A." not in name)
        self.start = {name: value.detach().clone() for name, value in self.named_parameters().items()}
        self.used = {name: mask.to(self.objective.device) for name, mask in self.used.items()}
        self.mask, plans = {}, self.stages(index)
        with torch.no_grad():
            for value in self.factors().values() if self.first_fit is FirstFit.fresh else ():
                value.zero_()
        trainer.fit(plans["dense"], self.named_parameters(), replace(self.hooks(index), validate=None), stage="dense")
        if not trainer.dry_run:
            self.mask = self.choose()
        with torch.no_grad():
            for name, value in self.named_parameters().items():
                value.copy_(self.start[name])
        trainer.fit(plans["sparse"], self.named_parameters(), self.hooks(index), stage="sparse")
        if self.disjoint:
            self.used = {name: mask | self.used.get(name, torch.zeros_like(mask)) for name, mask in self.mask.items()}

    def choose(self) -> dict[str, Tensor]:
        """The mask of this task, from B after the dense fit. Raises ConfigError if it cannot be chosen."""
        fresh = self.first_fit is FirstFit.fresh
        changes = {name: value.detach() - (0 if fresh else self.start[name]) for name, value in self.factors().items()}
        if not any(bool(change.any()) for change in changes.values()):
            raise ConfigError(f"method={self.name}: the dense fit has not changed B: raise train.lr or train.epochs")
        return largest_entries(changes, self.sparsity, self.used)

    def adjust_gradients(self, context: StepContext) -> None:
        factors = self.factors()
        for name, mask in self.mask.items():
            gradient = factors[name].grad
            if gradient is not None:
                gradient *= mask

    @torch.no_grad()
    def after_step(self, context: StepContext) -> None:
        factors = self.factors()
        for name, mask in self.mask.items():
            factors[name].copy_(torch.where(mask, factors[name], self.start[name]))


def largest_entries(
    changes: Mapping[str, Tensor], sparsity: float, used: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks of the floor((1 - sparsity) n) largest magnitudes over all tensors, and of those that equal the last one.

    Entries in `used` are left out. Raises ConfigError where too few remain.
    """
    sizes = {name: change.abs() for name, change in changes.items()}
    for name, mask in (used or {}).items():
        sizes[name] = sizes[name].masked_fill(mask, -1)
    values = torch.cat([size.flatten() for size in sizes.values()])
    count = int((1 - sparsity) * len(values) + 1e-9)
    remaining = int((values >= 0).sum())
    if not 0 < count <= remaining:
        raise ConfigError(
            f"method.sparsity={sparsity} needs {count} of the {remaining} entries of B that no mask has: change it, or "
            "set method.disjoint=false"
        )
    threshold = values.kthvalue(len(values) - count + 1).values
    return {name: (size >= threshold) & (size > 0) for name, size in sizes.items()}
