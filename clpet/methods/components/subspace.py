"""Directions that earlier tasks use: covariances of layer inputs and the orthonormal bases grown from them."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Covariance:
    """Running C = (1/n) sum x x^T, not centred, in fp32."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.total, self.n = torch.zeros(dim, dim, device=device), torch.zeros((), device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """x [..., dim]; positions where `mask` is 0 do not count."""
        x = x.float()
        if mask is not None:
            x = x * mask[..., None]
        x = x.flatten(0, -2)
        self.total += x.T @ x
        self.n += len(x) if mask is None else mask.sum()

    def mean(self) -> Tensor:
        """C [dim, dim] in fp64."""
        return self.total.double() / self.n


class InputCovariances:
    """Covariances of the inputs of layers while hooked; layers that read the same tensor share one.

    `masks`, each [batch, length], tell padding from text in the forward to come; the last is that of what is written.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.found: dict[str, Covariance] = {}
        self.same: dict[str, str] = {}  # layer -> the first layer that reads the same input
        self.masks: list[Tensor] = []
        self.read: dict[str, Tensor] = {}  # inputs of the present forward
        self.hooks = [module.register_forward_pre_hook(self.hook(name)) for name, module in layers.items()]

    def begin(self, *masks: Tensor) -> None:
        """Before every forward."""
        self.masks, self.read = list(masks), {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """What sees the input of layer `name`."""

        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first = next((other for other, held in self.read.items() if held is x), name)
            self.same[name] = first
            if first == name:
                self.read[name] = x
                covariance = self.found.setdefault(name, Covariance(x.shape[-1], x.device))
                fitting = [mask for mask in self.masks if mask.shape == x.shape[:-1]]
                covariance.add(x, fitting[-1 if reads_answer(name) else 0] if fitting else None)

        return see

    def __enter__(self) -> "InputCovariances":
        return self

    def __exit__(self, *_: object) -> None:
        self.read = {}
        for hook in self.hooks:
            hook.remove()


def reads_answer(layer: str) -> bool:
    """Whether a layer's input is the text that an encoder-decoder writes: all of the decoder but what it asks for."""
    return "decoder" in layer and not re.search(r"(EncDecAttention|encoder_attn)\.(k|v)", layer)


def project_out(x: Tensor, basis: Tensor) -> Tensor:
    """x (I - M M^T): the rows of x [..., d] without their parts in the span of M [d, q]."""
    return x - (x @ basis) @ basis.T


def threshold(epsilon: float, index: int, tasks: int) -> float:
    """eps_t = eps + (1 - eps) (t - 1) / T for the task at position `index` = t - 1."""
    return epsilon + (1 - epsilon) * index / tasks


def top_singular_vectors(covariance: Tensor, basis: Tensor) -> Tensor:
    """[d, d]: left singular vectors of (I - M M^T) C, largest first; none of them reaches into the span of M."""
    u = torch.linalg.svd(project_out(covariance.T, basis).T)[0]
    return project_out(u.T, basis).T


def extend_basis(basis: Tensor, covariance: Tensor, epsilon: float) -> Tensor:
    """The basis M [d, q] with the directions that C still needs for a share `epsilon` of its squared spectrum.

    An empty M takes the singular vectors whose cumulative share stays below epsilon, at least one (GainLoRA's
    published rule, one fewer than would reach epsilon); a later one grows until it reaches epsilon.
    """
    room = len(covariance) - basis.shape[1]
    u, s, _ = torch.linalg.svd(project_out(covariance.T, basis).T)
    total = covariance.square().sum()
    shares = s.square().cumsum(0) / total
    if basis.shape[1] == 0:
        return u[:, : max(1, int((shares < epsilon).sum()))]
    had = 1 - s.square().sum() / total
    reached = torch.cat([had[None], had + shares[:-1]])
    return torch.cat([basis, u[:, : min(room, int((reached < epsilon).sum()))]], dim=1)
