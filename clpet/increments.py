"""Low-rank increments stacked along the rank: h = W x + s ((x A^T) * w) B^T, in factored form, through hooks.

A [n r, d_in] and B [d_out, n r] hold n branches of rank r, s = alpha / r; w weighs branches, the same for all
examples or one row per example. The earlier branches are plain tensors and only the newest is trained: a layer
costs one pair of products for all the frozen branches and one for the newest, however many there are.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clpet.adapters import Adapters, plain_config
from clpet.errors import ModelError


class Increments:
    """The branches on every layer that peft=lora's targets name, on the model of `adapters`.

    Raises ModelError when no layer fits.
    """

    def __init__(self, adapters: Adapters) -> None:
        assert isinstance(adapters.config, peft.LoraConfig)
        self.adapters, self.config = adapters, adapters.config
        self.rank, self.scale = self.config.r, self.config.lora_alpha / self.config.r
        self.dropout = self.config.lora_dropout
        self.weights: Tensor | None = None  # [n r] or [batch, n r]
        self.on = True
        named = adapters.model.named_modules()
        modules = {name: module for name, module in named if check_target_module_exists(self.config, name)}
        unfit = [type(module).__name__ for module in modules.values() if not isinstance(module, nn.Linear | Conv1D)]
        if unfit or not modules:
            raise ModelError(adapters.wrong_target(f"{unfit[0]} is no linear layer" if unfit else "no such layers"))
        self.layers = {name: Layer(module, self) for name, module in modules.items()}

    @property
    def branches(self) -> int:
        """How many there are, the newest included."""
        layer = next(iter(self.layers.values()))
        return (len(layer.A) + len(layer.a)) // self.rank

    def add(self, seed: int) -> None:
        """Freezes the newest branch and starts another: A Kaiming-uniform with a = sqrt(5), B = 0, in fp32."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            a = torch.empty(self.rank, layer.d_in)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            layer.set(*layer.all(), a, torch.zeros(layer.d_out, self.rank))

    def current(self) -> dict[str, nn.Parameter]:
        """The newest branch's tensors by layer: NAME.A [r, d_in] and NAME.B [d_out, r]."""
        pairs = ((name, layer.a, layer.b) for name, layer in self.layers.items())
        return {f"{name}.{key}": tensor for name, a, b in pairs for key, tensor in (("A", a), ("B", b))}

    @contextlib.contextmanager
    def weighted(self, weights: Tensor | None) -> Iterator[None]:
        """Forwards inside mix the branches by `weights` [n] or [batch, n], newest last; None is 1 for each."""
        before = self.weights
        self.weights = None if weights is None else weights.repeat_interleave(self.rank, -1)
        try:
            yield
        finally:
            self.weights = before

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The backbone without any branch."""
        self.on, before = False, self.on
        try:
            yield
        finally:
            self.on = before

    def count(self) -> int:
        """Scalars in all branches."""
        return sum(tensor.numel() for layer in self.layers.values() for tensor in layer.all())

    def state(self) -> dict[str, Any]:
        """All branches, stacked, by layer."""
        return {name: dict(zip("AB", layer.all(), strict=True)) for name, layer in self.layers.items()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; the last branch is the newest."""
        for name, layer in self.layers.items():
            a, b = state[name]["A"], state[name]["B"]
            if old := len(a) - self.rank if len(a) else 0:
                layer.set(a[:old], b[:, :old], a[old:], b[:, old:])
            else:
                layer.set(a[:0], b[:, :0], a, b)

    def save(self, folder: Path, names: Sequence[str]) -> None:
        """Writes each branch under its name in peft's LoRA format, readable by PeftModel.from_pretrained."""
        for branch, name in enumerate(names):
            rows = slice(branch * self.rank, (branch + 1) * self.rank)
            tensors = {}
            for layer, (a, b) in ((layer, held.all()) for layer, held in self.layers.items()):
                tensors[f"base_model.model.{layer}.lora_A.weight"] = a[rows].cpu().contiguous()
                tensors[f"base_model.model.{layer}.lora_B.weight"] = b[:, rows].cpu().contiguous()
            self.config.save_pretrained(str(folder / name))
            save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
            plain_config(folder / name / "adapter_config.json")


class Layer:
    """One adapted layer: frozen A [(n - 1) r, d_in], B [d_out, (n - 1) r] and the newest branch a, b."""

    def __init__(self, module: nn.Module, owner: Increments) -> None:
        weight: Any = module.weight
        self.module, self.owner, self.device = module, owner, weight.device
        if isinstance(module, nn.Linear):
            self.d_in, self.d_out = module.in_features, module.out_features
        else:
            self.d_in, self.d_out = weight.shape  # GPT-2 stores its layers transposed
        nothing = torch.empty(0, self.d_in), torch.empty(self.d_out, 0)
        self.set(*nothing, *nothing)
        module.register_forward_hook(self.forward)

    def set(self, A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> None:
        """Replaces the frozen branches and the newest one."""
        self.A, self.B = A.to(self.device), B.to(self.device)
        self.a, self.b = nn.Parameter(a.to(self.device, copy=True)), nn.Parameter(b.to(self.device, copy=True))

    def all(self) -> tuple[Tensor, Tensor]:
        """A [n r, d_in] and B [d_out, n r] with the newest branch, detached."""
        return torch.cat([self.A, self.a.detach()]), torch.cat([self.B, self.b.detach()], dim=1)

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The layer's output plus the increment; one dropout mask serves all branches."""
        owner = self.owner
        if not owner.on or not len(self.a):
            return None
        x = inputs[0].to(self.a.dtype)
        if owner.dropout and owner.adapters.training:
            x = F.dropout(x, owner.dropout)
        old, new = self.split(x)
        total = product(x, self.a, self.b, new)
        if len(self.A):
            total = product(x, self.A, self.B, old) + total
        return (output + total * owner.scale).to(output.dtype)

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The weights of the frozen branches' rows and of the newest one's, broadcastable over positions.

        Where each example became several rows (candidate answers, one after the other), its weights go with them.
        """
        weights = self.owner.weights
        if weights is None:
            return None, None
        if weights.dim() == 2:
            weights = weights.repeat_interleave(len(x) // len(weights), 0)
            weights = weights.view(len(weights), *[1] * (x.dim() - 2), -1)
        return weights[..., : len(self.A)], weights[..., len(self.A) :]


def product(x: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """((x a^T) * weights) b^T."""
    h = F.linear(x, a)
    return F.linear(h if weights is None else h * weights, b)
