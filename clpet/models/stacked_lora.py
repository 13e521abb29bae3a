"""Low-rank increments stacked along the rank: h = W x + s ((x A^T) * w) B^T, in factored form, through hooks.

A [n r, d_in] and B [d_out, n r] hold n branches of rank r, s = alpha / r; w weighs branches, the same for all
examples or one row per example. The earlier branches are plain tensors and only the newest ones, one or several
added together, are trained: a layer costs one pair of products for all the frozen branches and one for the newest,
however many there are, or one pair for chosen branches alone. No d_out x d_in increment is ever made.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clpet.errors import ModelError, suggest
from clpet.models.adapters import Adapters, plain_config

Start = Callable[[Tensor, torch.Generator], object]


def kaiming(a: Tensor, generator: torch.Generator) -> None:
    """Uniform, with a = sqrt(5): how peft starts A."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


# The projection behind a layer's attention, as the backbones name it.
OUTPUTS = (
    "attention.output.dense",  # BERT, RoBERTa
    "self_attn.o_proj",  # LLaMA, Qwen
    "SelfAttention.o",  # T5
    "EncDecAttention.o",
    "attn.c_proj",  # GPT-2
    "attn.o",  # MPNet
    "self_attn.out_proj",  # OPT
)


def attention_outputs(model: nn.Module) -> list[str]:
    """The output projections of a model's attention layers, as targets. Raises ModelError where none is known."""
    names = [name for name, _ in model.named_modules()]
    found = [target for target in OUTPUTS if any(named(name, target) for name in names)]
    if not found:
        layers = suggest("", linear_layers(model))
        raise ModelError(f"the output projection of this model's attention is not known: say method.targets{layers}")
    return found


def linear_layers(model: nn.Module) -> set[str]:
    """The last parts of the names of all linear layers."""
    found = model.named_modules()
    return {name.rpartition(".")[2] for name, module in found if isinstance(module, nn.Linear | Conv1D)}


def named(name: str, target: str) -> bool:
    """Whether a module's name is the target's, or ends with it."""
    return name == target or name.endswith(f".{target}")


class Increments:
    """The branches on every layer that peft=lora's targets name, or those of `config`, on the model of `adapters`.

    Raises ModelError when no layer fits, or not each of `config`'s targets has one.
    """

    def __init__(self, adapters: Adapters, config: Any = None) -> None:
        for target in config.target_modules if config else []:
            if not any(named(name, target) for name, _ in adapters.model.named_modules()):
                layers = suggest("", linear_layers(adapters.model))
                raise ModelError(f"method.targets names the layer {target}, which the model does not have{layers}")
        config = config or adapters.config
        assert isinstance(config, peft.LoraConfig)
        self.adapters, self.config = adapters, config
        self.rank, self.scale = self.config.r, self.config.lora_alpha / self.config.r
        self.dropout = self.config.lora_dropout
        self.weights: Tensor | None = None  # [n r] or [batch, n r]
        self.on = True
        known = adapters.model.named_modules()
        modules = {name: module for name, module in known if check_target_module_exists(self.config, name)}
        unfit = [type(module).__name__ for module in modules.values() if not isinstance(module, nn.Linear | Conv1D)]
        if unfit or not modules:
            raise ModelError(adapters.wrong_target(f"{unfit[0]} is no linear layer" if unfit else "no such layers"))
        self.layers = {name: Layer(module, self) for name, module in modules.items()}

    @property
    def branches(self) -> int:
        """How many there are, the newest included."""
        layer = next(iter(self.layers.values()))
        return (len(layer.A) + len(layer.a)) // self.rank

    def add(self, seed: int, count: int = 1, start: Start = kaiming) -> None:
        """Freezes the newest branches and starts `count` others: A from `start`, B = 0, in fp32."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            a = torch.empty(count * self.rank, layer.d_in)
            start(a, generator)
            layer.set(*layer.all(), a, torch.zeros(layer.d_out, count * self.rank))

    def current(self) -> dict[str, nn.Parameter]:
        """The newest branches' tensors: N.LAYER.A [count r, d_in] and N.LAYER.B [d_out, count r], of N branches."""
        pairs = ((f"{self.branches}.{name}", layer.a, layer.b) for name, layer in self.layers.items())
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
    def mixed(self, weights: Tensor, branches: Tensor | None = None) -> Iterator[None]:
        """Forwards inside read only some branches, mixed by `weights` [batch, chosen].

        `branches` are their numbers in ascending order; None are the newest, which alone get gradients.
        """
        for layer in self.layers.values():
            layer.pick(None if branches is None else _rows(branches, self.rank))
        try:
            with self.weighted(weights):
                yield
        finally:
            for layer in self.layers.values():
                layer.chosen = None

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

    def load(self, state: dict[str, Any], newest: int = 1) -> None:
        """The inverse of `state`; the last `newest` branches are the newest."""
        for name, layer in self.layers.items():
            a, b = state[name]["A"], state[name]["B"]
            if old := len(a) - newest * self.rank if len(a) else 0:
                layer.set(a[:old], b[:, :old], a[old:], b[:, old:])
            else:
                layer.set(a[:0], b[:, :0], a, b)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds every branch to its layer's weight, and reads none from then on."""
        for layer in self.layers.values():
            a, b = layer.all()
            increment = self.scale * (b @ a)  # [d_out, d_in]
            weight: Any = layer.module.weight
            weight += (increment if isinstance(layer.module, nn.Linear) else increment.T).to(weight.dtype)
        self.on = False

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
    """One adapted layer: A, B of the frozen branches, and a, b of the newest ones."""

    def __init__(self, module: nn.Module, owner: Increments) -> None:
        weight: Any = module.weight
        self.module, self.owner, self.device = module, owner, weight.device
        if isinstance(module, nn.Linear):
            self.d_in, self.d_out = module.in_features, module.out_features
        else:
            self.d_in, self.d_out = weight.shape  # GPT-2 stores its layers transposed
        nothing = torch.empty(0, self.d_in), torch.empty(self.d_out, 0)
        self.chosen: tuple[Tensor, Tensor] | None = None  # A, B that forwards read in place of all
        self.set(*nothing, *nothing)
        module.register_forward_hook(self.forward)

    def set(self, A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> None:
        """Replaces the frozen branches and the newest one."""
        self.A, self.B = A.to(self.device), B.to(self.device)
        self.a, self.b = nn.Parameter(a.to(self.device, copy=True)), nn.Parameter(b.to(self.device, copy=True))

    def pick(self, rows: Tensor | None) -> None:
        """Forwards read these rows of A and columns of B; None are those of the newest branches."""
        if rows is None:
            self.chosen = self.a, self.b
        else:
            A, B = self.all()
            self.chosen = A[rows], B[:, rows]

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
        weights = self.spread(x)
        if self.chosen:
            total = product(x, *self.chosen, weights)
        else:
            old, new = split(weights, len(self.A))
            total = product(x, self.a, self.b, new)
            if len(self.A):
                total = product(x, self.A, self.B, old) + total
        return (output + total * owner.scale).to(output.dtype)

    def spread(self, x: Tensor) -> Tensor | None:
        """The weights of every row of A, broadcastable over positions.

        Where each example became several rows (candidate answers, one after the other), its weights go with them.
        """
        weights = self.owner.weights
        if weights is None or weights.dim() == 1:
            return weights
        weights = weights.repeat_interleave(len(x) // len(weights), 0)
        return weights.view(len(weights), *[1] * (x.dim() - 2), -1)


def split(weights: Tensor | None, old: int) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the frozen branches' rows and of the newest ones'."""
    return (None, None) if weights is None else (weights[..., :old], weights[..., old:])


def product(x: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """((x a^T) * weights) b^T."""
    h = F.linear(x, a)
    return F.linear(h if weights is None else h * weights, b)


def _rows(branches: Tensor, rank: int) -> Tensor:
    """The rows of A that branches own."""
    return (branches[:, None] * rank + torch.arange(rank, device=branches.device)).flatten()
