"""Rules that merge task vectors, the changes of weights by single tasks, into one change for all tasks.

A vector is a dict of matrices by layer. Quantities called global are over all matrices together, as one flat vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.models.stacked_lora import Switchable

Vector = Mapping[str, Tensor]


def add(vectors: Sequence[Vector]) -> dict[str, Tensor]:
    """Task arithmetic: sum_i tau_i (Ilharco et al., 2023, arXiv 2212.04089)."""
    return {name: torch.stack([vector[name] for vector in vectors]).sum(0) for name in vectors[0]}


def flat(vector: Vector) -> Tensor:
    """All entries of a vector."""
    return torch.cat([value.flatten() for value in vector.values()])


def norm(vector: Vector) -> Tensor:
    """The global Euclidean norm."""
    size: Tensor = torch.linalg.vector_norm(flat(vector))
    return size


def trim(vector: Vector, keep: float, faithful: bool) -> dict[str, Tensor]:
    """Sets all but the share `keep` of the entries with the largest magnitude to 0, globally; of equals the first stay.

    `faithful` keeps one entry more, and all that equal the smallest of these, as the published code does.
    """
    values = flat(vector)
    count = int(keep * len(values) + 1e-9)
    magnitudes = values.abs()
    if faithful and count < len(values):
        values = torch.where(magnitudes >= magnitudes.kthvalue(len(values) - count).values, values, 0)
    elif count < len(values):
        values = torch.where(largest(magnitudes, count), values, 0)
    pieces = values.split([value.numel() for value in vector.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(vector.items(), pieces, strict=True)}


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest values; of equals the first."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.sort(descending=True, stable=True).indices[:count]] = True
    return mask


def ties(vectors: Sequence[Vector], keep: float, mean: bool, faithful: bool) -> dict[str, Tensor]:
    """TIES: trims the vectors, elects a sign for every entry, aggregates the values that have it (arXiv 2306.01708).

    The sign is that of the sum; where that is 0, of the sum of all elected signs, and plus if that is 0 too. Aggregated
    is by mean or by sum.
    """
    trimmed = [trim(vector, keep, faithful) for vector in vectors]
    signs = {name: total.sign() for name, total in add(trimmed).items()}
    majority = torch.where(flat(signs).sum() < 0, -1, 1)
    merged = {}
    for name, sign in signs.items():
        stack = torch.stack([vector[name] for vector in trimmed])
        agrees = stack * torch.where(sign == 0, majority, sign) > 0
        total = torch.where(agrees, stack, 0).sum(0)
        merged[name] = total / agrees.sum(0).clamp(min=1) if mean else total
    return merged


def magmax(vectors: Sequence[Vector]) -> dict[str, Tensor]:
    """MagMax: of every entry the value with the largest magnitude, of equals the later one (arXiv 2407.06322)."""
    merged = dict(vectors[0])
    for vector in vectors[1:]:
        merged = {name: torch.where(vector[name].abs() >= old.abs(), vector[name], old) for name, old in merged.items()}
    return merged


def drop(vector: Vector, p: float, generator: Callable[[str], torch.Generator]) -> dict[str, Tensor]:
    """DARE: sets entries to 0 with probability p and divides the others by 1 - p (arXiv 2311.03099)."""
    masks = {name: torch.rand(value.shape, generator=generator(name)) >= p for name, value in vector.items()}
    return rescaled(vector, masks, p)


def rescaled(vector: Vector, masks: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """The entries in the masks divided by 1 - p, 0 elsewhere."""
    return {name: value * masks[name].to(value.device) / (1 - p) for name, value in vector.items()}


def project(merged: Tensor, new: Tensor, alpha: float) -> Tensor:
    """OPCM: what of a task vector [d_out, d_in] is orthogonal to the merged one (arXiv 2501.09522).

    With the full SVD T = U S V^T and P = U^T tau V, the diagonal of P and its block of the first k rows and columns are
    set to 0; k is the number of leading directions whose share of the sum of singular values is at most alpha.
    """
    u, s, vt = torch.linalg.svd(merged, full_matrices=True)
    k = int((s.cumsum(0) <= alpha * s.sum()).sum())
    p: Tensor = u.T @ new @ vt.T
    p.diagonal().zero_()
    p[:k, :k] = 0
    projected: Tensor = u @ p @ vt
    return projected


def opcm(
    merged: Vector, scale: float, norms: Sequence[float], new: Vector, alpha: float
) -> tuple[dict[str, Tensor], float]:
    """One step of OPCM: (T, l) from T and l before it, the norms of all task vectors and the newest vector.

    T' = l T + projected tau,   l <- |T'| / n,   T <- T' n / |T'|   with n the mean of the norms
    """
    total = {name: scale * merged[name] + project(merged[name], value, alpha) for name, value in new.items()}
    mean, size = sum(norms) / len(norms), float(norm(total))
    if not size or not mean:
        return total, 1.0
    return {name: value * (mean / size) for name, value in total.items()}, size / mean


class DenseIncrements(Switchable):
    """Changes of layers' weights that forward passes add while they are on: h = W x + D x. W itself never changes."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.tensors: dict[str, Tensor] = {}  # D [d_out, d_in] by layer
        self.enabled = False
        for name, module in layers.items():
            module.register_forward_hook(self.hook(name))

    def matrices(self) -> tuple[str, int, int]:
        """The name of the first layer, and the scalars that forward passes read now; none of them is trained."""
        read = sum(value.numel() for value in self.tensors.values()) if self.enabled else 0
        return next(iter(self.layers)), read, 0

    def spectra(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The singular values of D of every layer, and the layer's weight; nothing while they are off."""
        for name, value in self.tensors.items() if self.enabled else ():
            yield torch.linalg.svdvals(value.double()), cast(Tensor, self.layers[name].weight)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """The forward hook of one layer."""

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.enabled or name not in self.tensors:
                return None
            increment = self.tensors[name]
            return (output + F.linear(inputs[0].to(increment.dtype), increment)).to(output.dtype)

        return forward
