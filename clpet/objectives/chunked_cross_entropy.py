"""Cross-entropy over a large vocabulary in chunks, so that the logits of all tokens never exist at the same time."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits that exist at a time: 64 MiB in fp32, on a GPU 512 MiB. There every chunk reads and writes the gradient of a
# trained head once: with 64 MiB that is a fifth of the time of full fine-tuning (1.7B parameters, 152k tokens).
CHUNK = {"cpu": 2**24, "cuda": 2**27}


def mean_nll(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Mean of -log softmax(head(states))[targets]: states [n, dim], targets [n]; 0 without targets."""
    if len(targets) == 0:
        return states.sum() * 0.0
    if type(head) is nn.Linear:
        total: Tensor = _SumNll.apply(states, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
        return total / len(targets)
    return _checkpointed(states, targets, head).mean()


@torch.no_grad()
def token_nll(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """[n] fp32: -log softmax(head(states))[targets], without gradients."""
    chunks = [_nll(head(s), t) for s, t in _chunks(states, targets, head)]
    return torch.cat(chunks) if chunks else targets.new_zeros(0, dtype=torch.float32)


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Number of tokens per chunk."""
    return max(1, CHUNK.get(device.type, CHUNK["cpu"]) // vocabulary)


def _chunks(states: Tensor, targets: Tensor, head: nn.Module) -> list[tuple[Tensor, Tensor]]:
    size = chunk_size(len(cast(Tensor, head.weight)), states.device)
    return list(zip(states.split(size), targets.split(size), strict=True)) if len(targets) else []


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _checkpointed(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """[n] with gradients, for a head that is not a plain linear layer: the backward pass computes the logits again."""
    from torch.utils.checkpoint import checkpoint

    def chunk_nll(s: Tensor, t: Tensor) -> Tensor:
        return _nll(head(s), t)

    return torch.cat([checkpoint(chunk_nll, s, t, use_reentrant=False) for s, t in _chunks(states, targets, head)])


class _SumNll(torch.autograd.Function):
    """Sum of the negative log-likelihoods; computes the gradients chunk by chunk in the forward pass.

    d/dlogits = softmax - onehot, so grad_states = (softmax - onehot) W and grad_W = (softmax - onehot)^T states.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        by_states, by_weight, by_bias = (
            torch.zeros_like(tensor) if tensor is not None and needed else None
            for tensor, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total = torch.zeros((), device=states.device, dtype=torch.float32)
        w = weight.to(states.dtype)
        size = chunk_size(len(weight), states.device)
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            # Operands have the dtype of `states`; an enclosing autocast must not change it.
            with torch.autocast(states.device.type, enabled=False):
                logits = F.linear(states[chunk], w, None if bias is None else bias.to(states.dtype)).float()
                norm = logits.logsumexp(1, keepdim=True)
                total += (norm - logits.gather(1, targets[chunk, None])).sum()
                if by_states is None and by_weight is None and by_bias is None:
                    continue
                slope = logits.sub_(norm).exp_()  # softmax, in place: the logits are the largest tensor of a step
                slope.scatter_add_(1, targets[chunk, None], slope.new_full((len(slope), 1), -1.0))
                if by_bias is not None:
                    by_bias += slope.sum(0)
                slope = slope.to(states.dtype)
                if by_states is not None:
                    by_states[chunk] = slope @ w
                if by_weight is not None:
                    by_weight += slope.mT @ states[chunk]
        ctx.save_for_backward(by_states, by_weight, by_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times that of the sum; None for `targets`."""
        return (*(None if value is None else value * grad.to(value.dtype) for value in ctx.saved_tensors), None)
