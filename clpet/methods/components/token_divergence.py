"""Divergences of two next-token distributions, for a student that is trained towards a teacher.

With p_S and p_T from the student's and the teacher's logits, for every token
    alpha = 0    KL(p_T || p_S)            alpha = 1    KL(p_S || p_T)
    between      alpha KL(p_T || m) + (1 - alpha) KL(p_S || m),   m = (1 - alpha) p_S + alpha p_T
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clpet.objectives.chunked_cross_entropy import chunk_size

Pair = tuple[Tensor, Tensor]
Compare = Callable[[Tensor, Tensor, Tensor], Pair]


def in_chunks(compare: Compare, student: Tensor, teacher: Tensor, tokens: Tensor) -> Pair:
    """Two values per token, from logits [tokens, vocabulary]. The backward pass computes each chunk's softmax again."""
    size = chunk_size(student.shape[1], student.device)
    if len(tokens) <= size:
        return compare(student, teacher, tokens)
    chunks = zip(student.split(size), teacher.split(size), tokens.split(size), strict=True)
    parts = [cast(Pair, checkpoint(compare, *chunk, use_reentrant=False)) for chunk in chunks]
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def on_support(student: Tensor, teacher: Tensor, top_k: int, tail: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [tokens, support] of both models; with `top_k` on the student's most likely tokens alone.

    These are normalised, or with `tail` followed by the probability of all other tokens.
    """
    both = student.log_softmax(1), teacher.log_softmax(1)
    if top_k == 0 or top_k >= student.shape[1]:
        return both
    indices = student.topk(top_k).indices
    likely = [values.gather(1, indices) for values in both]
    sums = [values.logsumexp(1, keepdim=True) for values in likely]
    if not tail:
        return likely[0] - sums[0], likely[1] - sums[1]
    rest = [(-torch.expm1(total.clamp(max=-1e-7))).log() for total in sums]
    return torch.cat([likely[0], rest[0]], 1), torch.cat([likely[1], rest[1]], 1)


def divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """[tokens] from log-probabilities [tokens, support]."""
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return alpha * kl(teacher, mixture) + (1 - alpha) * kl(student, mixture)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def token_losses(student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """sg(d) ln p_S(y) with d = ln p_S(y) - ln p_T(y) of the sampled tokens y, whose gradient is on average that of
    KL(p_S || p_T); and d, whose mean is that divergence.
    """
    of_student, of_teacher = (
        values.log_softmax(1).gather(1, tokens[:, None]).squeeze(1) for values in (student, teacher)
    )
    difference = (of_student - of_teacher).detach()
    return difference * of_student, difference


def mean_behind(values: Tensor, skip: int) -> Tensor:
    """The mean of the values after the first `skip`; 0 without any."""
    return values[skip:].sum() / max(1, len(values) - skip)
