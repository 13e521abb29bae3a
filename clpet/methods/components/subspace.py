"""Subspaces that earlier tasks use: covariances of layer inputs and orthonormal bases M grown from them.

Formulas of InfLoRA (Liang and Li, 2024, arXiv 2404.00228) in the form used by GainLoRA (Liang et al., 2025).
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clpet.runtime.distributed import get_world


class Covariance:
    """Running uncentred covariance C = (1/n) sum x x^T, accumulated in fp32."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.total, self.n = torch.zeros(dim, dim, device=device), torch.zeros((), device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Adds the vectors x [..., dim], except where `mask` [...] is 0."""
        x = x.float()
        if mask is not None:
            x = x * mask[..., None]
        x = x.flatten(0, -2)
        self.total += x.T @ x
        self.n += len(x) if mask is None else mask.sum()

    def mean(self) -> Tensor:
        """C [dim, dim] in fp64."""
        return self.total.double() / self.n


def sum_over_ranks(covariances: dict[str, Covariance], device: torch.device) -> None:
    """Adds what the other ranks have accumulated from their shares of the batches. All ranks must make this call."""
    sizes: dict[str, int] = {}
    for of_rank in get_world().gather({name: len(one.total) for name, one in covariances.items()}):
        sizes |= of_rank
    for name in sorted(sizes.keys() - covariances.keys()):  # a rank with fewer batches than others may have had none
        covariances[name] = Covariance(sizes[name], device)
    get_world().sum_shares([x for name in sorted(sizes) for x in (covariances[name].total, covariances[name].n)])


class InputCovariances:
    """Accumulates the covariances of layer inputs in every forward inside `with`; call `begin` before each forward.

    Layers that receive the same tensor (such as query, key and value projections) share one covariance.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.covariances: dict[str, Covariance] = {}
        self.source: dict[str, str] = {}  # layer -> the layer whose covariance it shares, often itself
        self.masks: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}  # distinct inputs of the current forward by layer
        self.hooks = [module.register_forward_pre_hook(self.hook(name)) for name, module in layers.items()]

    def begin(self, *masks: Tensor) -> None:
        """Prepares a forward. `masks`, each [batch, length], are 0 for padding; the decoder's mask comes last."""
        self.masks, self.inputs = list(masks), {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook that adds the input of layer `name`."""

        def add_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            source = next((other for other, tensor in self.inputs.items() if tensor is x), name)
            self.source[name] = source
            if source == name:
                self.inputs[name] = x
                covariance = self.covariances.setdefault(name, Covariance(x.shape[-1], x.device))
                covariance.add(x, mask_of(self.masks, x, name))

        return add_input

    def __enter__(self) -> "InputCovariances":
        return self

    def __exit__(self, *_: object) -> None:
        self.inputs = {}  # else the last forward's tensors would stay in memory
        for hook in self.hooks:
            hook.remove()


def mask_of(masks: Sequence[Tensor], x: Tensor, layer: str) -> Tensor | None:
    """The one of `Objective.masks` that belongs to a layer's input or output [..., d]; None if no shape is its own."""
    matching = [mask for mask in masks if mask.shape == x.shape[:-1]]
    return matching[-1 if reads_answer(layer) else 0] if matching else None


def reads_answer(layer: str) -> bool:
    """Whether a layer of an encoder-decoder reads the answer: decoder layers except cross-attention keys and values."""
    return "decoder" in layer and not re.search(r"(EncDecAttention|encoder_attn)\.(k|v)", layer)


def project_out(x: Tensor, basis: Tensor) -> Tensor:
    """x (I - M M^T): removes from the rows of x [..., d] their components in the span of M [d, q]."""
    return x - (x @ basis) @ basis.T


def threshold(epsilon: float, index: int, tasks: int) -> float:
    """eps_t = eps + (1 - eps) (t - 1) / T for task t, where `index` = t - 1."""
    return epsilon + (1 - epsilon) * index / tasks


def top_singular_vectors(covariance: Tensor, basis: Tensor) -> Tensor:
    """[d, d]: left singular vectors of (I - M M^T) C by falling singular value, all orthogonal to the span of M."""
    # project_out works on rows: (C^T (I - M M^T))^T = (I - M M^T) C.
    u = torch.linalg.svd(project_out(covariance.T, basis).T)[0]
    return project_out(u.T, basis).T  # vectors of singular value 0 may still point into the span of M


def extend_basis(basis: Tensor, covariance: Tensor, epsilon: float) -> Tensor:
    """Appends to the basis M [d, q] the directions needed to explain a share `epsilon` of C's squared spectrum.

    With an empty M: the singular vectors whose cumulative share stays below epsilon, at least one. This is the rule
    of GainLoRA's published code, which takes one vector fewer than reaching epsilon needs. Afterwards M grows until
    epsilon is reached.
    """
    room = len(covariance) - basis.shape[1]  # M cannot have more than d columns
    u, s, _ = torch.linalg.svd(project_out(covariance.T, basis).T)
    total = covariance.square().sum()
    shares = s.square().cumsum(0) / total
    if basis.shape[1] == 0:
        new_basis: Tensor = u[:, : max(1, int((shares < epsilon).sum()))]
        return new_basis
    explained = 1 - s.square().sum() / total  # by M alone
    before = torch.cat([explained[None], explained + shares[:-1]])  # share explained before each vector is added
    return torch.cat([basis, u[:, : min(room, int((before < epsilon).sum()))]], dim=1)
