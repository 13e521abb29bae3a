"""Many LoRA branches on one layer, stacked along the rank: h = W x + s ((x A^T) * w) B^T, computed in forward hooks.

A [n r, d_in] and B [d_out, n r] hold n branches of rank r, s = alpha / r; w weights the branches, either one vector for
all examples or one row per example. Earlier branches are plain tensors; only the newest ones (one, or several added at
once) are trained. A layer therefore costs one pair of matrix products for all frozen branches and one for the newest,
however many there are, or a single pair if only selected branches are read. The product B A is never formed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clpet.errors import ModelError, suggest
from clpet.metrics.drift import low_rank_singular_values
from clpet.models.adapters import Adapters, plain_config
from clpet.models.architectures import attention_outputs, matches

Init = Callable[[Tensor, torch.Generator], object]


def kaiming(A: Tensor, generator: torch.Generator) -> None:
    """Kaiming-uniform with a = sqrt(5), peft's initialisation of A."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)


def require_attention_outputs(model: nn.Module) -> list[str]:
    """The output projections of a model's attention layers, as targets. Raises ModelError if none is known."""
    targets = attention_outputs(model)
    if not targets:
        layers = suggest("", linear_layers(model))
        raise ModelError(f"the output projection of this model's attention is unknown: set method.targets{layers}")
    return targets


def linear_layers(model: nn.Module) -> set[str]:
    """The last name components of all linear layers."""
    modules = model.named_modules()
    return {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


class Switchable:
    """Something that forward passes add to layers while it is enabled."""

    enabled: bool

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Forward passes inside ignore it."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before


class StackedLora(Switchable):
    """The branches of all adapted layers: those that the targets of peft=lora, or of `config`, name.

    Raises ModelError if no layer matches, or if a target of `config` matches none.
    """

    def __init__(self, adapters: Adapters, config: peft.PeftConfig | None = None, newest: int = 1) -> None:
        for target in getattr(config, "target_modules", None) or []:
            if not any(matches(name, target) for name, _ in adapters.model.named_modules()):
                layers = suggest("", linear_layers(adapters.model))
                raise ModelError(f"method.targets names the layer {target}, which the model does not have{layers}")
        config = config or adapters.config
        assert isinstance(config, peft.LoraConfig)
        self.adapters, self.config = adapters, config
        self.newest = newest  # number of branches that are trained together
        self.rank, self.scale = self.config.r, self.config.lora_alpha / self.config.r
        self.dropout = self.config.lora_dropout
        self.weights: Tensor | None = None  # [n r] or [batch, n r]
        self.enabled = True
        named_modules = adapters.model.named_modules()
        modules = {name: module for name, module in named_modules if check_target_module_exists(self.config, name)}
        others = [type(module).__name__ for module in modules.values() if not isinstance(module, nn.Linear | Conv1D)]
        if others or not modules:
            reason = f"{others[0]} is not a linear layer" if others else "no layer matches"
            raise ModelError(adapters.wrong_target(reason))
        self.layers = {name: StackedLoraLayer(module, self) for name, module in modules.items()}
        adapters.branches.append(self)

    @property
    def branches(self) -> int:
        """Number of branches, the newest included."""
        layer = next(iter(self.layers.values()))
        return (len(layer.frozen_A) + len(layer.A)) // self.rank

    def add(self, seed: int, count: int = 1, init: Init = kaiming) -> None:
        """Freezes the newest branches and adds `count` new ones in fp32: A from `init`, B = 0."""
        self.newest = count
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            A = torch.empty(count * self.rank, layer.d_in)
            init(A, generator)
            layer.set(*layer.all(), A, torch.zeros(layer.d_out, count * self.rank))

    def current(self) -> dict[str, nn.Parameter]:
        """The newest branches' tensors: N.LAYER.A [count r, d_in] and N.LAYER.B [d_out, count r]; N is `branches`."""
        pairs = ((f"{self.branches}.{name}", layer.A, layer.B) for name, layer in self.layers.items())
        return {f"{name}.{key}": tensor for name, A, B in pairs for key, tensor in (("A", A), ("B", B))}

    @contextlib.contextmanager
    def branch_weights(self, weights: Tensor | None) -> Iterator[None]:
        """Forward passes inside weight the branches by `weights` [n] or [batch, n], newest last; None is 1 for each."""
        before = self.weights
        self.weights = None if weights is None else weights.repeat_interleave(self.rank, -1)
        try:
            yield
        finally:
            self.weights = before

    @contextlib.contextmanager
    def selected_branches(self, weights: Tensor | None, branches: Tensor | None = None) -> Iterator[None]:
        """Forward passes inside read only some branches, weighted by `weights` [batch, selected]; None is 1 for each.

        `branches` are their numbers in ascending order; None selects the newest, the only ones that get gradients.
        """
        for layer in self.layers.values():
            layer.select(None if branches is None else _rows(branches, self.rank))
        try:
            with self.branch_weights(weights):
                yield
        finally:
            for layer in self.layers.values():
                layer.selected = None

    def spectra(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The singular values of the sum of all branches of every layer, and the layer's weight; nothing if off.

        Branches are weighted as in forward passes; weights by example have no such sum.
        """
        assert self.weights is None or self.weights.dim() == 1
        for layer in self.layers.values() if self.enabled else ():
            A, B = layer.all()
            values = low_rank_singular_values(A, B if self.weights is None else B * self.weights, self.scale)
            yield values, cast(Tensor, layer.module.weight)

    def count(self) -> int:
        """Number of scalars in all branches."""
        return sum(tensor.numel() for layer in self.layers.values() for tensor in layer.all())

    def matrices(self) -> tuple[str, int, int]:
        """The name of the first adapted layer, scalars of all branches, and of the newest ones."""
        newest = sum(tensor.numel() for layer in self.layers.values() for tensor in (layer.A, layer.B))
        return next(iter(self.layers)), self.count() if self.enabled else 0, newest if self.enabled else 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A and B of all branches by layer."""
        return {name: dict(zip("AB", layer.all(), strict=True)) for name, layer in self.layers.items()}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restores what `state` returned; the last `newest` branches become the trainable ones."""
        for name, layer in self.layers.items():
            A, B = state[name]["A"], state[name]["B"]
            if frozen := len(A) - self.newest * self.rank if len(A) else 0:
                layer.set(A[:frozen], B[:, :frozen], A[frozen:], B[:, frozen:])
            else:
                layer.set(A[:0], B[:, :0], A, B)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds every branch to the weight of its layer; from then on forward passes ignore the branches."""
        for layer in self.layers.values():
            A, B = layer.all()
            add_to_weight(layer.module, self.scale * (B @ A))
        self.enabled = False

    def save(self, folder: Path, names: Sequence[str]) -> None:
        """Writes each branch under its name in peft's LoRA format, readable by PeftModel.from_pretrained."""
        for branch, name in enumerate(names):
            rows = slice(branch * self.rank, (branch + 1) * self.rank)
            tensors = {}
            for layer_name, layer in self.layers.items():
                A, B = layer.all()
                tensors[f"base_model.model.{layer_name}.lora_A.weight"] = A[rows].cpu().contiguous()
                tensors[f"base_model.model.{layer_name}.lora_B.weight"] = B[:, rows].cpu().contiguous()
            self.config.save_pretrained(str(folder / name))
            save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
            plain_config(folder / name / "adapter_config.json")


class StackedLoraLayer:
    """One adapted layer: frozen_A and frozen_B of earlier branches, A and B of the newest, trainable ones."""

    def __init__(self, module: nn.Module, owner: StackedLora) -> None:
        weight = cast(Tensor, module.weight)
        self.module, self.owner, self.device = module, owner, weight.device
        if isinstance(module, nn.Linear):
            self.d_in, self.d_out = module.in_features, module.out_features
        else:
            self.d_in, self.d_out = weight.shape  # GPT-2 stores its layers transposed
        empty = torch.empty(0, self.d_in), torch.empty(self.d_out, 0)
        self.selected: tuple[Tensor, Tensor] | None = None  # (A, B) that forward passes read instead of all
        self.router: Callable[[Tensor], Tensor] | None = None  # weights [..., n] of the branches from the layer's input
        self.set(*empty, *empty)
        module.register_forward_hook(self.forward)

    def set(self, frozen_A: Tensor, frozen_B: Tensor, A: Tensor, B: Tensor) -> None:
        """Replaces the frozen branches and the newest ones."""
        self.frozen_A, self.frozen_B = frozen_A.to(self.device), frozen_B.to(self.device)
        self.A, self.B = nn.Parameter(A.to(self.device, copy=True)), nn.Parameter(B.to(self.device, copy=True))

    def select(self, rows: Tensor | None) -> None:
        """Forward passes read these rows of A and columns of B; None selects the newest branches."""
        if rows is None:
            self.selected = self.A, self.B
        else:
            A, B = self.all()
            self.selected = A[rows], B[:, rows]

    def all(self) -> tuple[Tensor, Tensor]:
        """A [n r, d_in] and B [d_out, n r] of all branches, detached."""
        return torch.cat([self.frozen_A, self.A.detach()]), torch.cat([self.frozen_B, self.B.detach()], dim=1)

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The layer's output plus the branches' increment. All branches share one dropout mask."""
        owner = self.owner
        if not owner.enabled or not len(self.A):
            return None
        x = inputs[0]
        if owner.dropout and owner.adapters.training:
            x = F.dropout(x, owner.dropout)
        weights = self.rank_weights(x)
        if self.router is not None:
            weights = self.router(inputs[0]).repeat_interleave(owner.rank, -1)
        if self.selected:
            total = low_rank_product(x, *self.selected, weights)
        else:
            frozen, newest = split_weights(weights, len(self.frozen_A))
            total = low_rank_product(x, self.A, self.B, newest)
            if len(self.frozen_A):
                total = low_rank_product(x, self.frozen_A, self.frozen_B, frozen) + total
        return (output + total * owner.scale).to(output.dtype)

    def rank_weights(self, x: Tensor) -> Tensor | None:
        """The weight of every row of A, broadcastable over the positions of `x`."""
        weights = self.owner.weights
        return weights if weights is None or weights.dim() == 1 else weights_of_rows(weights, x)


def weights_of_rows(weights: Tensor, x: Tensor) -> Tensor:
    """The weights [batch, n] of examples, broadcastable over the positions of `x` [rows, ..., d].

    If each example became several consecutive rows of `x` (candidate answers), its weights are repeated.
    """
    weights = weights.repeat_interleave(len(x) // len(weights), 0)
    return weights.view(len(weights), *[1] * (x.dim() - 2), -1)


@torch.no_grad()
def add_to_weight(module: nn.Module, increment: Tensor) -> None:
    """Adds an increment [d_out, d_in] to the weight of a linear layer."""
    weight = cast(Tensor, module.weight)
    weight += (increment if isinstance(module, nn.Linear) else increment.T).to(weight.dtype)


def split_weights(weights: Tensor | None, frozen: int) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the `frozen` rows of frozen_A and of the rows of A."""
    return (None, None) if weights is None else (weights[..., :frozen], weights[..., frozen:])


def low_rank_product(x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None) -> Tensor:
    """((x A^T) * weights) B^T, in the dtype of `x`."""
    h = F.linear(x, A.to(x.dtype))
    return F.linear(h if weights is None else (h * weights).to(x.dtype), B.to(x.dtype))


def _rows(branches: Tensor, rank: int) -> Tensor:
    """The rows of A that belong to the given branches."""
    return (branches[:, None] * rank + torch.arange(rank, device=branches.device)).flatten()
