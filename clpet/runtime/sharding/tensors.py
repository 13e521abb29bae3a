"""Arithmetic on sharded tensors: equations on the rows of this rank, and sums over the rows of all ranks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from clpet.runtime.distributed import get_world, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether every rank holds some rows of a tensor only."""
    return is_sharded(tensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some of the tensors are sharded."""
    return any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank; the tensor itself if it is not sharded. Gradients flow back to the tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def trainable_rows(parameter: nn.Parameter) -> nn.Parameter:
    """The rows of this rank as a parameter that shares their memory, for an optimiser; the parameter if not sharded."""
    return nn.Parameter(local(parameter.detach())) if is_dtensor(parameter) else parameter


def wrap(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of this rank as a tensor that is sharded as `like` is; `rows` if that is not sharded."""
    if not is_dtensor(like):
        return rows
    return _from_rows(rows, like.device_mesh, like.shape[0])


def _from_rows(rows: Tensor, mesh: "DeviceMesh", count: int) -> "DTensor":
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    shape = torch.Size((count, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def aligned(value: Tensor, like: Tensor) -> Tensor:
    """A value in the layout of `like`: whole, or the rows of this rank. All ranks must make this call."""
    if is_dtensor(value) and not is_dtensor(like):
        return value.full_tensor()
    if is_dtensor(like) and not is_dtensor(value):
        start, stop = own_rows(len(like), like.device_mesh)
        return wrap(value[start:stop].to(like.device), like)
    return value


def own_rows(count: int, mesh: "DeviceMesh") -> tuple[int, int]:
    """First and last + 1 of this rank's rows of a tensor with `count` rows."""
    sizes = row_counts(count, mesh)
    number = shard_number(mesh)
    return sum(sizes[:number]), sum(sizes[: number + 1])


def row_counts(count: int, mesh: "DeviceMesh") -> list[int]:
    """Number of rows on each rank of a group, as torch.chunk divides them."""
    size = mesh.size(mesh.ndim - 1)
    chunk = -(-count // size)
    return [max(0, min(chunk, count - number * chunk)) for number in range(size)]


def shard_number(mesh: "DeviceMesh") -> int:
    """Position of this rank among those that divide the rows."""
    return mesh.get_local_rank(mesh.ndim - 1)


def in_first_replica(mesh: "DeviceMesh") -> bool:
    """Whether this rank's group of shards is the first one, which writes."""
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def from_rows(rows: Tensor, count: int) -> Tensor:
    """This rank's rows of a tensor with `count` rows, as a sharded tensor of a network whose weights are sharded."""
    mesh = get_world().mesh
    assert mesh is not None
    return _from_rows(rows.to(mesh.device_type), mesh, count)


def copied(tensor: Tensor) -> Tensor:
    """A copy of a sharded tensor."""
    return wrap(local(tensor.detach()).clone(), tensor)


class _SumOverShards(torch.autograd.Function):
    """The sum of a value over the ranks of a group; its gradient is that of this rank's part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: "DeviceMesh") -> Tensor:
        total = value.detach().clone()
        torch.distributed.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Sums a value that was computed from this rank's rows of `like` over those of all ranks; differentiable."""
    if not is_dtensor(like):
        return value
    return cast(Tensor, _SumOverShards.apply(value, like.device_mesh))  # type: ignore[no-untyped-call]


def sums(values: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each (theta, x): x summed over the rows of all ranks, with one message for all; x where theta is whole."""
    sharded = [(theta, x) for theta, x in values if is_dtensor(theta)]
    if not sharded:
        return [x for _, x in values]
    total = iter(sum_over_shards(torch.stack([x for _, x in sharded]), sharded[0][0]))
    return [next(total) if is_dtensor(theta) else x for theta, x in values]


def on_all_ranks(flag: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Whether a flag, which was computed from this rank's rows of tensors, is set on all ranks."""
    if not any_sharded(like):
        return flag
    flags = flag.to(torch.uint8)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
    return flags.bool()


def pack(vector: Tensor, like: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """A flat vector over the rows of this rank, as checkpoints store it: split and sharded as the tensors are."""
    if not any_sharded(like):
        return vector
    pieces = vector.split([local(tensor).numel() for tensor in like])
    return [wrap(piece.view_as(local(tensor)), tensor) for piece, tensor in zip(pieces, like, strict=True)]


@torch.no_grad()
def unpack(saved: Tensor | Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The inverse of `pack`, on any number of ranks."""
    if isinstance(saved, Tensor):
        if not any_sharded(like):
            return saved
        pieces = saved.split([tensor.numel() for tensor in like])
        saved = [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
    rows = [local(aligned(piece, tensor)) for piece, tensor in zip(saved, like, strict=True)]
    return torch.cat([piece.flatten() for piece in rows])


def smallest(vector: Tensor, number: int, like: Sequence[Tensor]) -> Tensor:
    """The `number`-th smallest value, from 1, of a flat vector without negative values over the rows of all ranks.

    Floating-point numbers of one sign have the order of their bits, in which the value is searched by bisection.
    """
    if not any_sharded(like):
        return vector.kthvalue(number).values
    mesh_of = next(filter(is_sharded, like))
    bits = vector.double().view(torch.int64)
    low, high = 0, 2**63 - 1
    while low < high:
        middle = (low + high) // 2
        count = sum_over_shards((bits <= middle).sum(), mesh_of)
        low, high = (low, middle) if int(count) >= number else (middle + 1, high)
    return torch.tensor(low, dtype=torch.int64, device=vector.device).view(torch.float64).to(vector.dtype)
