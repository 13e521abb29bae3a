"""How far a model has moved from the pretrained one: divergences of its predictions, its hidden states, its weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergences(base: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """([n] KL(base || now), [n] KL(now || base)) in nats of two sets of logits [n, vocabulary]."""
    log_base, log_now = F.log_softmax(base.float(), dim=-1), F.log_softmax(now.float(), dim=-1)
    difference = log_base - log_now
    return (log_base.exp() * difference).sum(-1), -(log_now.exp() * difference).sum(-1)


def nll_and_drift(base: Tensor, now: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """([n] -log p of the targets [n] now, [n] how much more that is than before), from logits [n, vocabulary]."""
    before, after = (F.cross_entropy(logits.float(), targets, reduction="none") for logits in (base, now))
    return after, after - before


def linear_cka(base: Tensor, now: Tensor) -> float:
    """Linear CKA of two representations [n, dim] of the same n tokens (Kornblith et al., 2019), 1 if they are equal.

    |X^T Y|^2 / (|X^T X| |Y^T Y|) with Frobenius norms and centred columns. It does not change with rotation, shift and
    scale, and is biased towards 1 for n < 4 dim.
    """
    X, Y = (values.double() - values.double().mean(0) for values in (base, now))
    if len(X) < X.shape[1]:  # the same value from n x n matrices, which are then smaller
        X, Y = X @ X.T, Y @ Y.T
        between, within_X, within_Y = (X * Y).sum(), (X * X).sum(), (Y * Y).sum()
    else:
        between, within_X, within_Y = ((A.T @ B).square().sum() for A, B in ((X, Y), (X, X), (Y, Y)))
    if between == within_X == within_Y:
        return 1.0
    return float(between / (within_X * within_Y).sqrt().clamp(min=1e-300))


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007); 0 for a zero matrix."""
    values = singular_values.double()
    values = values[values > 0]
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(values) else 0.0


def stable_rank(singular_values: Tensor) -> float:
    """The squared Frobenius norm divided by the squared largest singular value; 0 for a zero matrix."""
    values = singular_values.double()
    largest = values.max() if len(values) else values.new_zeros(())
    return float(values.square().sum() / largest.square()) if largest > 0 else 0.0


def hidden_rank(states: Tensor) -> float:
    """The effective rank of hidden states [n, dim] with centred columns."""
    values = states.double()
    return effective_rank(torch.linalg.svdvals(values - values.mean(0)))


def low_rank_singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """[r]: the singular values of scale * B A, from A [r, d_in] and B [d_out, r], without forming the product."""
    A, B = A.detach().double(), B.detach().double()
    if not len(A):
        return A.new_zeros(1)
    product: Tensor = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
    values: Tensor = torch.linalg.svdvals(abs(scale) * product)
    return values


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
