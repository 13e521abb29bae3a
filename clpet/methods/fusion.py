"""Fusion: LoRAs that are trained alone, one per task, and weighted together (Pfeiffer et al., 2021, arXiv 2005.00247).

    h = W x + sum_i w_i z_i,   z_i = s B_i A_i x
The LoRA of a task is trained with a softmax over its labels, and frozen. Then w is, by `mode`,
    uniform    1 / n
    scalar     softmax(c) with a number c_i per task, the same in all layers
    attention  softmax_i((Q x + q) . (K z_i)) with Q, q and K of every layer, for every token
where c, or Q, q and K, are trained on the task's examples and the memory. Unlike the paper there are no values V: the
increments of LoRAs are added as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.inc_lora import IncLoRA
from clpet.models.peft_options import FullFineTuning
from clpet.models.stacked_lora import StackedLoraLayer, kaiming
from clpet.objectives.base import Objective
from clpet.objectives.classification import Classification
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Mode(Enum):
    """Where the weights of the LoRAs come from."""

    uniform = "uniform"
    scalar = "scalar"
    attention = "attention"


class Attention(nn.Module):
    """Q [size, d_in] with its bias and K [size, d_out] of every layer. K starts at 0, so that all weights are equal."""

    def __init__(self, layers: list[StackedLoraLayer], size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        queries = [torch.empty(size, layer.d_in) for layer in layers]
        for query in queries:
            kaiming(query, generator)
        device = layers[0].device
        self.queries = nn.ParameterList([query.to(device) for query in queries])
        self.biases = nn.ParameterList([torch.zeros(size, device=device) for _ in layers])
        self.keys = nn.ParameterList([torch.zeros(size, layer.d_out, device=device) for layer in layers])


@dataclass
class Fusion(IncLoRA):
    """The head is trained with the LoRA of its task and, with weights that are learned, with the fusion."""

    mode: Mode = Mode.attention
    size: int = 16

    mergeable: ClassVar[bool] = False
    uses_validation: ClassVar[bool] = False
    uses_replay: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("logits_of_tasks", "attention")

    def __post_init__(self) -> None:
        require(self.size >= 1, "method.size", self.size, "at least 1")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay != "none" and self.mode is Mode.uniform:
            raise ConfigError(f"method={self.name} replays nothing with method.mode=uniform: set replay=none")
        if replay == "none" and self.mode is not Mode.uniform:
            raise ConfigError(
                f"method.mode={self.mode.value} would learn to choose the newest task: set replay=reservoir, or "
                "method.mode=uniform"
            )

    def ineffective(self) -> dict[str, str]:
        attends = self.mode is Mode.attention
        return {} if attends else {"method.size": f"method.mode={self.mode.value} has no queries and keys"}

    def init_adapters(self) -> None:
        super().init_adapters()
        layers, device = list(self.stack.layers.values()), self.objective.device
        self.logits_of_tasks = nn.Parameter(torch.zeros(0, device=device))  # c [branches]
        attends = self.mode is Mode.attention
        self.attention = Attention(layers, self.size, derive(self.seed, "fusion")) if attends else None
        self.fused = True  # whether forward passes weight the LoRAs; False: they read the newest alone

    def routing(self, number: int, layer: StackedLoraLayer) -> Callable[[Tensor], Tensor]:
        """The weights [..., branches] of a layer's inputs [..., d_in]."""
        attention, scale, rank = self.attention, self.stack.scale, self.stack.rank
        assert attention is not None

        def weights(x: Tensor) -> Tensor:
            A, B = layer.all()
            factors = attention.queries[number], attention.biases[number], attention.keys[number]
            return attention_weights(x.float(), A, scale * B, rank, *factors)

        return weights

    def set_fused(self, on: bool) -> None:
        """Whether forward passes weight all LoRAs, or read the newest alone."""
        self.fused = on
        for number, layer in enumerate(self.stack.layers.values()):
            layer.A.requires_grad_(not on)
            layer.B.requires_grad_(not on)
            layer.select(None)
            if on:
                layer.selected = None
            layer.router = self.routing(number, layer) if on and self.attention is not None else None

    def add_branch(self, index: int) -> None:
        super().add_branch(index)
        zeros = self.logits_of_tasks.new_zeros(1)
        self.logits_of_tasks = nn.Parameter(torch.cat([self.logits_of_tasks.detach(), zeros]))

    def stages(self, index: int) -> dict[str, BatchPlan]:
        plans = {"adapter": self.replay.new_only_plan(index)}
        return (
            plans if self.mode is Mode.uniform or index == 0 else {**plans, "fusion": self.replay.plan(index, "fusion")}
        )

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.add_branch(index)
        self.grow_head(index)
        for stage, plan in self.stages(index).items():
            self.set_fused(stage == "fusion")
            hooks = self.hooks(index)
            trainer.fit(plan, self.named_parameters(), replace(hooks, validate=None), stage=stage)
        self.set_fused(True)

    def route(self, batch: Batch) -> Tensor | None:
        if not self.fused or self.attention is not None:
            return None
        return self.logits_of_tasks.softmax(0)

    def loss(self, context: StepContext) -> Tensor:
        """While a LoRA is trained alone, the labels of its task compete: old rows would be pushed down under it."""
        if isinstance(self.objective, Classification) and not self.fused:
            with self.objective.softmax_of_task():
                return self.routed_loss(context.batch, None)
        return self.routed_loss(context.batch, self.route(context.batch))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        if not self.fused or not self.stack.branches:
            return super().named_parameters()
        return {**self.fusion_weights(), **self.objective.parameters()}

    def fusion_weights(self) -> dict[str, nn.Parameter]:
        """What weights the LoRAs, as far as it is trained."""
        if self.attention is not None:
            return {f"fusion.{name}": value for name, value in self.attention.named_parameters()}
        return {f"logits{self.stack.branches}": self.logits_of_tasks} if self.mode is Mode.scalar else {}

    def trainable_parameters(self) -> int:
        """Those of both stages: the newest LoRA, the head, and from the second task on what weights the LoRAs."""
        weights = self.fusion_weights() if self.stack.branches > 1 else {}
        return sum(value.numel() for value in {**super().named_parameters(), **weights}.values())

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.stack.branches:
            self.set_fused(True)

    def save(self, folder: Path) -> None:
        """Writes each LoRA, and what weights them."""
        super().save(folder)
        weights = dict(self.attention.state_dict()) if self.attention else {"logits": self.logits_of_tasks.detach()}
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / "fusion.safetensors")


def attention_weights(x: Tensor, A: Tensor, B: Tensor, rank: int, query: Tensor, bias: Tensor, key: Tensor) -> Tensor:
    """[..., n]: softmax_i((Q x + q) . (K B_i A_i x)) for A [n r, d_in] and B [d_out, n r]; no z_i is formed."""
    products = (x @ A.T) * ((x @ query.T + bias) @ (key @ B))  # [..., n r]
    weights: Tensor = products.unflatten(-1, (-1, rank)).sum(-1).softmax(-1)
    return weights
