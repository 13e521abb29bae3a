"""Gradients of sharded parameters: their norm, and those of a loss outside of a step."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from clpet.runtime.distributed import get_world, is_sharded
from clpet.runtime.sharding.tensors import any_sharded, local, sums


def local_gradient(tensor: Tensor) -> Tensor | None:
    """The rows of this rank of a tensor's gradient."""
    return None if tensor.grad is None else local(tensor.grad)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of gradients together, of which some may be sharded."""
    if not any_sharded(gradients):
        return nn.utils.get_total_norm(gradients)
    squares = [(gradient, local(gradient).float().square().sum()) for gradient in gradients]
    return torch.stack(sums(squares)).sum().sqrt()


def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_, also of sharded parameters."""
    if not any_sharded(parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor has a NaN or an infinity, on any rank."""
    finite = bool(torch.stack([local(tensor).isfinite().all() for tensor in tensors]).all()) if tensors else True
    return not get_world().all_reduce_max(not finite)[0] if any_sharded(tensors) else finite


def local_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The rows of this rank of the gradients that exist; a change of them in place changes the gradients."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


@contextlib.contextmanager
def own_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients that arise in this block do not add to those from before, which are back afterwards.

    FSDP sums the gradients of sharded tensors only where it adds them to the tensors.
    """
    before = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def gradients_of_share(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """d loss / d parameter of a loss that every rank has a part of, in `own_gradients`.

    Of sharded tensors they are those of this rank's rows, summed over ranks; of others those of this rank's loss.
    """
    if not any_sharded(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad) for p in parameters]


def gradients(loss: Tensor, named: Mapping[str, nn.Parameter]) -> list[Tensor | None]:
    """d loss / d parameter of a loss that all ranks compute equally; of sharded parameters that of this rank's rows."""
    parameters = list(named.values())
    if not any_sharded(parameters):
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    size = get_world().size
    with own_gradients(parameters):
        for parameter in parameters:
            parameter.grad = None
        (loss / size).backward(retain_graph=True)  # FSDP sums over ranks
        return [_times(local_gradient(value), 1 if is_sharded(value) else size) for value in parameters]


def _times(gradient: Tensor | None, factor: int) -> Tensor | None:
    return None if gradient is None else gradient * factor
