"""Cross-entropy over a large vocabulary in chunks: the logits of a long text never exist as a whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**24  # logits that exist at a time


def mean_nll(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Mean of -log softmax(head(states))[targets]: states [n, dim], targets [n]; no terms give 0."""
    if len(targets) == 0:
        return states.sum() * 0.0
    if type(head) is nn.Linear:
        return _Mean.apply(states, head.weight, head.bias, targets) / len(targets)
    return _through(states, targets, head).mean()


@torch.no_grad()
def token_nll(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """[n] fp32: -log softmax(head(states))[targets], without gradients."""
    parts = [_nll(head(s), t) for s, t in _parts(states, targets, _rows(head))]
    return torch.cat(parts) if parts else targets.new_zeros(0, dtype=torch.float32)


def _rows(head: Any) -> int:
    """States whose logits fill a chunk."""
    return max(1, CHUNK // head.weight.shape[0])


def _parts(states: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(states.split(size), targets.split(size), strict=True)) if len(targets) else []


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _through(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """[n] with gradients, through a head that is more than one matrix: its logits are computed again for them."""
    from torch.utils.checkpoint import checkpoint

    def part(s: Tensor, t: Tensor) -> Tensor:
        return _nll(head(s), t)

    return torch.cat([checkpoint(part, s, t, use_reentrant=False) for s, t in _parts(states, targets, _rows(head))])


class _Mean(torch.autograd.Function):
    """Sum of the negative log-likelihoods; gradients are made chunk by chunk while the logits are there.

    d/dlogits = softmax - onehot, so grad_states = (softmax - onehot) W and grad_W = (softmax - onehot)^T states.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        by_states, by_weight, by_bias = (
            torch.zeros_like(tensor) if tensor is not None and wanted else None
            for tensor, wanted in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total = torch.zeros((), device=states.device, dtype=torch.float32)
        w = weight.to(states.dtype)
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            with torch.autocast(states.device.type, enabled=False):
                logits = F.linear(states[part], w, None if bias is None else bias.to(states.dtype)).float()
                norm = logits.logsumexp(1, keepdim=True)
                total += (norm - logits.gather(1, targets[part, None])).sum()
                if by_states is None and by_weight is None and by_bias is None:
                    continue
                slope = logits.sub_(norm).exp_()
                slope.scatter_add_(1, targets[part, None], slope.new_full((len(slope), 1), -1.0))
                if by_bias is not None:
                    by_bias += slope.sum(0)
                slope = slope.to(states.dtype)
                if by_states is not None:
                    by_states[part] = slope @ w
                if by_weight is not None:
                    by_weight += slope.mT @ states[part]
        ctx.save_for_backward(by_states, by_weight, by_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if found is None else found * grad.to(found.dtype) for found in ctx.saved_tensors), None)
