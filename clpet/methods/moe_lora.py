"""MoE-LoRA: experts of low rank, weighted for every token by a router (CoIN, Chen et al., 2024, arXiv 2403.08350).

In every adapted layer, with E experts of rank r / E and a router W_r [E, d_in],
    h = W x + (alpha / r) sum_i w_i B_i A_i x,   w = softmax(W_r x)
where r and alpha are those of peft=lora. The experts and the router are trained task by task, without further terms:
sequential fine-tuning of another adapter. With top_k only the largest weights remain, divided by their sum.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.errors import ConfigError
from clpet.methods.inc_lora import IncLoRA
from clpet.models.peft_options import FullFineTuning, Lora
from clpet.models.stacked_lora import StackedLora, kaiming
from clpet.objectives.base import Objective

INITIAL_STD = 0.01  # of A


class Routers(nn.Module):
    """The routers [experts, d_in] of all layers, initialised as linear layers are."""

    def __init__(self, widths: list[int], experts: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.empty(experts, width) for width in widths]
        for weight in weights:
            kaiming(weight, generator)
        self.weights = nn.ParameterList([weight.to(device) for weight in weights])


@dataclass
class MoELoRA(IncLoRA):
    """All tasks share the experts, so nothing grows. The weights depend on the token, so it cannot be merged."""

    experts: int = 4
    top_k: int = 0

    mergeable: ClassVar[bool] = False
    uses_replay: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("routers",)

    def __post_init__(self) -> None:
        require(self.experts >= 1, "method.experts", self.experts, "at least 1")
        require(0 <= self.top_k <= self.experts, "method.top_k", self.top_k, f"from 0 (all) to {self.experts}")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if isinstance(peft, Lora) and peft.r % self.experts:
            raise ConfigError(f"peft.r={peft.r} cannot be divided among method.experts={self.experts}")

    def init_adapters(self) -> None:
        config = copy.copy(self.objective.adapters.config)
        assert isinstance(config, peft.LoraConfig)
        # Both are divided by the number of experts, so that alpha / r stays as it is.
        config.r, config.lora_alpha = config.r // self.experts, config.lora_alpha / self.experts  # type: ignore[assignment]
        self.stack = StackedLora(self.objective.adapters, config, newest=self.experts)
        self.stack.add(derive(self.seed, "adapter", "default"), self.experts, normal)
        layers = list(self.stack.layers.values())
        seed, device = derive(self.seed, "routers"), self.objective.device
        self.routers = Routers([layer.d_in for layer in layers], self.experts, seed, device)
        for number, (name, layer) in enumerate(self.stack.layers.items()):
            layer.router = self.routing(number, name, self.routers.weights[number])

    def routing(self, number: int, name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The experts' weights [..., experts] of a layer's inputs [..., d_in], in fp32."""
        return lambda x: expert_weights(x, weight, self.top_k)

    def add_branch(self, index: int) -> None:
        """Adds nothing: the experts are those of all tasks."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        routers = zip(self.stack.layers, self.routers.weights, strict=True)
        return {**super().named_parameters(), **{f"{name}.router": weight for name, weight in routers}}

    def save(self, folder: Path) -> None:
        """Writes each expert as a separate LoRA, and the routers."""
        self.stack.save(folder, [f"expert{number}" for number in range(self.experts)])
        routers = dict(zip(self.stack.layers, self.routers.weights, strict=True))
        save_file({name: weight.detach().cpu() for name, weight in routers.items()}, folder / "routers.safetensors")


def normal(A: Tensor, generator: torch.Generator) -> None:
    """A ~ N(0, 0.01^2)."""
    A.normal_(0, INITIAL_STD, generator=generator)


def expert_weights(x: Tensor, router: Tensor, top_k: int = 0) -> Tensor:
    """[..., experts] fp32: softmax(W_r x); with `top_k` the largest ones, divided by their sum."""
    weights = F.linear(x.float(), router.float()).softmax(-1)
    if not top_k:
        return weights
    largest = weights.topk(top_k, -1)
    return torch.zeros_like(weights).scatter(-1, largest.indices, largest.values / largest.values.sum(-1, keepdim=True))
