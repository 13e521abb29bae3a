"""How a training pass computes on a GPU, and what it keeps there: TF32 products, activations in the host's memory."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

OFFLOADED = 2**20  # bytes from which on a tensor is worth a copy


@contextlib.contextmanager
def tf32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """On a GPU with a bf16 backbone, products that stay fp32 are rounded to TF32, which is more exact than bf16."""
    if device.type != "cuda" or dtype is torch.float32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def offloaded(weights: Iterable[Tensor]) -> Iterator[None]:
    """What a forward pass inside keeps for its backward pass is copied to pinned host memory, weights excepted.

    torch.autograd.graph.save_on_cpu would copy the frozen weights too, at every step.
    """
    resident = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.nbytes < OFFLOADED or tensor.untyped_storage().data_ptr() in resident:
            return None, tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, copy.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
