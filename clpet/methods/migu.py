"""MIGU: only the outputs with the largest magnitude get a gradient (Du et al., 2024, arXiv 2406.17245).

For every trained linear map, n_j = sum over the tokens of a step of |output j|. From task 2 on, with the quantile of n
in that map, the gradient of row j of its weight is multiplied by
    m_j = 1 if n_j >= quantile(n, `quantile`), else 0
A LoRA is two maps, A and B, each with its own mask. Everything else is sequential fine-tuning, or replay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.errors import ConfigError, ModelError
from clpet.methods.components.subspace import mask_of
from clpet.methods.replay import Static
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import network_of
from clpet.objectives.base import Objective
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.gradients import local_gradient
from clpet.runtime.sharding.tensors import aligned, local
from clpet.training.step import StepContext


@dataclass
class MIGU(Static):
    """With AdamW, moments and weight decay still move masked rows, as in the published code; `strict` undoes that."""

    quantile: float = 0.7
    strict: bool = False
    faithful_padding: bool = False

    uses_replay: ClassVar[bool] = True
    reads_activations: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True  # one pass per example, whose outputs are counted

    def __post_init__(self) -> None:
        require(0 <= self.quantile < 1, "method.quantile", self.quantile, "in [0, 1)")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if not (peft.traits.lora_factors or peft.traits.full):
            raise ConfigError(
                f"method={self.name} needs trained linear maps, which peft={peft.name} has not: use lora or none"
            )

    def init_adapters(self) -> None:
        super().init_adapters()
        model = self.objective.adapters.model
        embedding = network_of(model).get_input_embeddings().weight  # never masked, also where it is the output layer
        trained = {id(value): name for name, value in self.objective.adapters.tensors("default").items()}
        trained.pop(id(embedding), None)
        self.maps: dict[str, nn.Linear] = {}  # by the name of the weight
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear) and id(module.weight) in trained:
                self.maps[trained[id(module.weight)]] = module
                module.register_forward_hook(self.adding(trained[id(module.weight)], layer))
        if not self.maps:
            raise ModelError(
                f"method={self.name} finds no trained linear layer in this model (GPT-2 has none): use peft=lora"
            )
        self.sums: dict[str, Tensor] = {}  # n of this step
        self.masks: list[Tensor] | None = None  # of the batch whose outputs are added; None: none are
        self.before: dict[str, Tensor] = {}  # weights before this step

    def adding(self, name: str, layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """A forward hook that adds the magnitudes of a map's outputs to its sums."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.masks is None or not torch.is_grad_enabled():
                return
            size = output.detach().abs().float()
            mask = None if self.faithful_padding else mask_of(self.masks, size, layer)
            total = (size if mask is None else size * mask[..., None]).flatten(0, -2).sum(0)
            self.sums[name] += total

        return add

    def loss(self, context: StepContext) -> Tensor:
        self.masks = self.objective.masks(context.batch) if context.counts else None
        try:
            return super().loss(context)
        finally:
            self.masks = None

    def before_step(self, context: StepContext) -> None:
        device = self.objective.device
        self.sums = {name: torch.zeros(module.out_features, device=device) for name, module in self.maps.items()}

    def adjust_gradients(self, context: StepContext) -> None:
        if context.task == 0:
            return
        get_world().sum(list(self.sums.values()))
        weights = {name: module.weight for name, module in self.maps.items()}
        masks = {name: large(total, self.quantile) for name, total in self.sums.items()}
        rows = {name: local(aligned(mask, weights[name])) for name, mask in masks.items()}
        for name, mask in rows.items():
            gradient = local_gradient(weights[name])
            if gradient is not None:
                gradient *= mask[:, None]
        if self.strict:
            self.before = {name: local(weights[name].detach())[~mask].clone() for name, mask in rows.items()}
            self.rows = rows

    @torch.no_grad()
    def after_step(self, context: StepContext) -> None:
        for name, values in self.before.items():
            local(self.maps[name].weight.detach())[~self.rows[name]] = values
        self.before = {}


def large(total: Tensor, quantile: float) -> Tensor:
    """Mask of the entries that are at least the quantile, linearly interpolated."""
    return total >= torch.quantile(total, quantile)
