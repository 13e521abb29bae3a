"""How much weights matter, units of weights, and the fusion of old and new weights by it: functions on tensors.

Formulas of KIF (Feng et al., 2024, arXiv 2408.05200) and of its predecessor TaSL (arXiv 2408.09857).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SCORES = ("first", "second", "mix")
STATE = {
    "mean": "mean",
    "deviation": "uncertainty",
    "counted": "counted",
    "skipped": "skipped",
}  # checkpoint key -> attribute


class Importance:
    """Running scores of many weights, flat and on their device; nothing waits for the device until they are read.

    With w a weight and g its gradient, a step's score s is |wg| (first), (wg)^2 (second) or |wg - (wg)^2 / 2|
    (mix): the change of the loss when w becomes 0. I <- b1 I + (1 - b1) s and then U <- b2 U + (1 - b2) |s - I|,
    both from 0 and without bias correction. The importance of a weight is I U.

    A step whose scores are not all finite changes nothing and is counted in `skipped`.
    """

    def __init__(
        self, size: int, score: str, beta1: float, beta2: float, skip_first: bool, like: Tensor | None = None
    ) -> None:
        like = torch.zeros(()) if like is None else like
        self.score, self.beta1, self.beta2, self.skip_first = score, beta1, beta2, skip_first
        self.mean, self.uncertainty = like.new_zeros(size), like.new_zeros(size)
        self.counted, self.skipped = (torch.zeros((), dtype=torch.long, device=like.device) for _ in range(2))
        self.steps = 0
        self.best, self.best_scores = float("-inf"), dict[str, Tensor]()

    @torch.no_grad()
    def update(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Counts one step, unless it is the first one and that is skipped."""
        self.steps += 1
        if self.skip_first and self.steps == 1:
            return
        s = flat(torch._foreach_mul(weights, gradients)).to(self.mean.dtype)
        if self.score == "mix":
            s = torch.addcmul(s, s, s, value=-0.5)
        s = s.square_() if self.score == "second" else s.abs_()
        finite = s.amax().isfinite()
        s = torch.where(finite, s, self.mean)
        on = finite.to(s.dtype)
        self.mean.lerp_(s, on * (1 - self.beta1))
        self.uncertainty.lerp_(s.sub_(self.mean).abs_(), on * (1 - self.beta2))
        self.counted += finite
        self.skipped += ~finite

    def elements(self) -> Tensor:
        """[size] fp64: I U of every weight."""
        return self.mean.to(torch.float64, copy=True).mul_(self.uncertainty)

    def clear(self) -> None:
        """Forgets the scores, not the counts."""
        self.mean.zero_()
        self.uncertainty.zero_()

    def keep(self, validation: float) -> None:
        """Remembers the present scores where they belong to the best validation so far."""
        if validation > self.best:
            self.best, self.best_scores = validation, {key: value.clone() for key, value in self._tensors().items()}

    def restore(self) -> None:
        """Returns to the scores of the best validation, if there was any validation."""
        for key, value in self.best_scores.items():
            self._tensors()[key].copy_(value)

    def state(self) -> dict[str, Any]:
        """What an interrupted task goes on from."""
        return {"now": self._tensors(), "kept": self.best_scores, "best": self.best, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for key, value in state["now"].items():
            self._tensors()[key].copy_(value)
        self.best_scores = {key: value.to(self.mean.device) for key, value in state["kept"].items()}
        self.best, self.steps = state["best"], state["steps"]

    def _tensors(self) -> dict[str, Tensor]:
        """The running tensors by their key in a checkpoint."""
        return {key: getattr(self, attribute) for key, attribute in STATE.items()}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All scalars of the tensors in one vector, detached."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def unflat(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flat`: views by name, in the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def gradients(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Of each tensor; zeros for one that the loss does not reach."""
    return [torch.zeros_like(value) if value.grad is None else value.grad for value in tensors.values()]


class ParameterGroups:
    """Which scalars are weighed together: a tensor, or (by rank) row p of a LoRA A with column p of its B.

    A value per unit is a vector [units], or a dict of its parts by group: the tensor's name, or the LoRA's module.
    """

    def __init__(self, tensors: dict[str, Tensor], by_rank: bool) -> None:
        self.by_rank = by_rank
        self.groups: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            group = name.partition(".lora_")[0] if by_rank else name
            self.groups.setdefault(group, []).append(name)
            self.sizes[group] = len(_by_unit(name, tensor, by_rank))

    def scores(self, elements: dict[str, Tensor], how: str = "product_of_means") -> Tensor:
        """[units] from the importance of every scalar by tensor name: the mean over a tensor; for a rank the mean of
        the outer product of B's column and A's row, that is the product of their means, or the mean over both
        together (mean_of_concat).
        """
        found = []
        for names in self.groups.values():
            rows = [_by_unit(name, elements[name], self.by_rank) for name in names]
            if how == "product_of_means":
                found.append(torch.stack([row.mean(1) for row in rows]).prod(0))
            else:
                found.append(torch.cat(rows, 1).mean(1))
        return torch.cat(found)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector's parts by group."""
        return dict(zip(self.groups, vector.split(list(self.sizes.values())), strict=True))

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`, by name."""
        return torch.cat([parts[group] for group in self.groups])

    def broadcast(self, vector: Tensor) -> dict[str, Tensor]:
        """Tensor name -> the values of its units, in a shape that broadcasts against the tensor."""
        return {
            name: (part if ".lora_B." in name else part[:, None]) if self.by_rank else part[0]
            for group, part in self.split(vector).items()
            for name in self.groups[group]
        }


def _by_unit(name: str, value: Tensor, by_rank: bool) -> Tensor:
    """[units, scalars of each]."""
    if not by_rank:
        return value.reshape(1, -1)
    return value.mT if ".lora_B." in name else value


def norm(x: Tensor) -> Tensor:
    """(x - min) / (max - min); zeros where all are equal."""
    low, high = x.aminmax()
    return torch.where(high > low, (x - low) / (high - low), 0)


def accumulate(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """Importance over all tasks so far: Norm(beta Norm(old) + (1 - beta) Norm(new))."""
    return norm(beta * norm(old) + (1 - beta) * norm(new))


def above_percentile(x: Tensor, percentile: float, strict: bool = True) -> Tensor:
    """Which units lie above (strict), or at least at, a percentile; linear between ranks."""
    threshold = torch.quantile(x, percentile / 100)
    return x > threshold if strict else x >= threshold


def above_quantile(x: Tensor, q: float) -> Tensor:
    """Which of very many values lie strictly above their quantile q, by selecting one of them instead of sorting.

    Between two neighbours the linear quantile parts them as the lower one does, so no interpolation is needed.
    """
    return x > x.kthvalue(int(q * (len(x) - 1)) + 1).values


def adaptive(old: Tensor, new: Tensor, tau: float) -> Tensor:
    """Weight of the new value: sigmoid((new - old) / tau), on normalised importance."""
    return torch.sigmoid((new - old) / tau)


def static(old: Tensor, new: Tensor, gamma: float) -> Tensor:
    """Weight of the new value from two masks: shared 1 - gamma, old only 0, new only 1, neither 1/2."""
    weight = torch.full(old.shape, 0.5, dtype=torch.float64, device=old.device)
    weight[new & ~old], weight[old & ~new], weight[old & new] = 1.0, 0.0, 1 - gamma
    return weight


def fuse(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """weight new + (1 - weight) old, in fp32 or better; rows that `old` has not keep their new value."""
    exact = torch.promote_types(new.dtype, torch.float32)
    known = new if new.shape == old.shape else new[: len(old)]
    mixed = torch.lerp(old.to(exact), known.to(exact), weight.to(exact)).to(new.dtype)
    return mixed if known is new else torch.cat([mixed, new[len(old) :]])


def orthogonality(factors: Sequence[Tensor], squared: bool = False) -> Tensor:
    """Mean of ||M M^T - I||_F (or its square) over matrices M [r, d]; the subgradient is 0 where a norm is 0.

    Equal shapes go through one batched product: a model has hundreds of small factors.
    """
    shapes: dict[torch.Size, list[Tensor]] = {}
    for factor in factors:
        shapes.setdefault(factor.shape, []).append(factor)
    total = factors[0].new_zeros(())
    for shape, group in shapes.items():
        stack = torch.stack(group)
        excess = stack @ stack.mT - torch.eye(shape[0], dtype=stack.dtype, device=stack.device)
        total = total + (excess.square().sum() if squared else torch.linalg.matrix_norm(excess).sum())
    return total / len(factors)
