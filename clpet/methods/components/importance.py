"""Importance of weights, units of weights, and the fusion of old and new weights by importance: functions on tensors.

Formulas of KIF (Feng et al., 2024, arXiv 2408.05200) and of its predecessor TaSL (arXiv 2408.09857).
"""

from collections.abc import Iterable, Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor

from clpet.runtime.sharding.gradients import local_gradient
from clpet.runtime.sharding.tensors import any_sharded, local, on_all_ranks, pack, smallest, sums, unpack

SCORES = ("first", "second", "mix")
# Checkpoint key -> attribute of Importance.
STATE = {"mean": "mean", "deviation": "uncertainty", "counted": "counted", "skipped": "skipped"}


Packed = Tensor | list[Tensor]


class ImportanceState(TypedDict):
    """The running tensors and those of the best validation; keys are part of the checkpoint format."""

    now: dict[str, Packed]
    kept: dict[str, Packed]
    best: float
    steps: int


class Importance:
    """Running importance of many weights as flat tensors on their device, updated without waiting for the device.

    With w a weight and g its gradient, the score s of a step estimates the change of the loss if w became 0:
        first   s = |wg|            second  s = (wg)^2            mix  s = |wg - (wg)^2 / 2|
    Sensitivity and uncertainty are its running means, both from 0 and without bias correction:
        I <- b1 I + (1 - b1) s          (`mean`)
        U <- b2 U + (1 - b2) |s - I|    (`uncertainty`, with the I just updated)
    The importance of a weight is the product I U.

    A step with a NaN or infinite score changes nothing and is counted in `skipped`.
    """

    def __init__(
        self,
        size: int,
        score: str,
        beta1: float,
        beta2: float,
        skip_first: bool,
        like: Tensor | None = None,
        tensors: Sequence[Tensor] = (),
    ) -> None:
        """`tensors` are those whose scalars are scored; if they are sharded, the vectors are of this rank's rows."""
        like, self.tensors = torch.zeros(()) if like is None else like, tensors
        self.score, self.beta1, self.beta2, self.skip_first = score, beta1, beta2, skip_first
        self.mean, self.uncertainty = like.new_zeros(size), like.new_zeros(size)
        self.counted, self.skipped = (torch.zeros((), dtype=torch.long, device=like.device) for _ in range(2))
        self.steps = 0
        self.best, self.best_scores = float("-inf"), dict[str, Tensor]()

    @torch.no_grad()
    def update(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Adds the scores of one step; with `skip_first` the first step is ignored."""
        self.steps += 1
        if self.skip_first and self.steps == 1:
            return
        s = flat(torch._foreach_mul([local(weight) for weight in weights], gradients)).to(self.mean.dtype)  # wg
        if self.score == "mix":
            s = torch.addcmul(s, s, s, value=-0.5)
        s = s.square_() if self.score == "second" else s.abs_()
        # Branching on `finite` in Python would wait for the device in every step; a weight of 0 skips the step instead.
        finite = on_all_ranks(s.amax().isfinite(), self.tensors)
        s = torch.where(finite, s, self.mean)  # 0 * nan would still be nan
        on = finite.to(s.dtype)
        self.mean.lerp_(s, on * (1 - self.beta1))
        self.uncertainty.lerp_(s.sub_(self.mean).abs_(), on * (1 - self.beta2))
        self.counted += finite
        self.skipped += ~finite

    def elements(self) -> Tensor:
        """[size] fp64: I U of every weight; in fp32 small products would underflow to 0."""
        return self.mean.to(torch.float64, copy=True).mul_(self.uncertainty)

    def clear(self) -> None:
        """Resets the scores to 0, but not the counts."""
        self.mean.zero_()
        self.uncertainty.zero_()

    def keep_best(self, validation: float) -> None:
        """Stores a copy of the current scores if `validation` is the best validation score so far."""
        if validation > self.best:
            self.best, self.best_scores = validation, {key: value.clone() for key, value in self._tensors().items()}

    def restore_best(self) -> None:
        """Returns to the scores of the best validation, if there was any validation."""
        for key, value in self.best_scores.items():
            self._tensors()[key].copy_(value)

    def state(self) -> ImportanceState:
        """Everything that an interrupted task needs to resume."""
        now, best = (self._packed(tensors) for tensors in (self._tensors(), self.best_scores))
        return {"now": now, "kept": best, "best": self.best, "steps": self.steps}

    def load(self, state: ImportanceState) -> None:
        """Restores what `state` returned."""
        for key, value in state["now"].items():
            self._tensors()[key].copy_(self._unpacked(key, value))
        best = {key: self._unpacked(key, value) for key, value in state["kept"].items()}
        self.best_scores = {key: value.to(self.mean.device) for key, value in best.items()}
        self.best, self.steps = state["best"], state["steps"]

    def _packed(self, tensors: dict[str, Tensor]) -> dict[str, Packed]:
        """Tensors by their key, the vectors as checkpoints of sharded runs store them."""
        return {key: pack(value, self.tensors) if value.dim() else value for key, value in tensors.items()}

    def _unpacked(self, key: str, value: Packed) -> Tensor:
        return unpack(value, self.tensors) if self._tensors()[key].dim() else cast(Tensor, value)

    def _tensors(self) -> dict[str, Tensor]:
        """The running tensors by their key in a checkpoint."""
        return {key: getattr(self, attribute) for key, attribute in STATE.items()}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenates all scalars of the tensors, those of this rank's rows, into one detached vector."""
    return torch.cat([local(tensor.detach()).flatten() for tensor in tensors])


def unflat(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits a vector made by `flat` into views by name, with the shapes of `like`, or of this rank's rows."""
    rows = {name: local(tensor.detach()) for name, tensor in like.items()}
    slices = vector.split([tensor.numel() for tensor in rows.values()])
    return {name: values.view_as(tensor) for (name, tensor), values in zip(rows.items(), slices, strict=True)}


def gradients(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The gradient of each tensor, or of this rank's rows; zeros for a tensor that the loss does not depend on."""
    of_rows = [local_gradient(value) for value in tensors.values()]
    pairs = zip(tensors.values(), of_rows, strict=True)
    return [torch.zeros_like(local(value.detach())) if gradient is None else gradient for value, gradient in pairs]


class ParameterGroups:
    """Groups scalars into units that are scored and fused as one.

    A unit is a whole tensor or, with `by_rank`, row p of a LoRA matrix A together with column p of its B. Values per
    unit are one vector [units], or a dict with the slice of each group: a tensor's name, or the module of a LoRA.
    """

    def __init__(self, tensors: dict[str, Tensor], by_rank: bool) -> None:
        self.by_rank, self.tensors = by_rank, tensors
        self.groups: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            group = name.partition(".lora_")[0] if by_rank else name
            self.groups.setdefault(group, []).append(name)
            self.sizes[group] = len(_by_unit(name, local(tensor.detach()), by_rank))

    def scores(self, elements: dict[str, Tensor], how: str = "product_of_means") -> Tensor:
        """Scores [units] from the importance of every scalar (`elements`, by tensor name).

        A tensor's score is the mean over its scalars. The score of a LoRA rank is
        product_of_means  mean(A's row) mean(B's column), which equals the mean of their outer product, or
        mean_of_concat    the mean over the scalars of both.
        """
        if any_sharded(self.tensors.values()):
            totals = sums([(tensor, elements[name].sum()) for name, tensor in self.tensors.items()])
            return torch.stack([total / t.numel() for total, t in zip(totals, self.tensors.values(), strict=True)])
        scores = []
        for names in self.groups.values():
            rows = [_by_unit(name, elements[name], self.by_rank) for name in names]
            if how == "product_of_means":
                scores.append(torch.stack([row.mean(1) for row in rows]).prod(0))
            else:
                scores.append(torch.cat(rows, 1).mean(1))
        return torch.cat(scores)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The slice of a vector [units] that belongs to each group."""
        return dict(zip(self.groups, vector.split(list(self.sizes.values())), strict=True))

    def join(self, slices: dict[str, Tensor]) -> Tensor:
        """Concatenates the slices made by `split`, in the order of this object's groups."""
        return torch.cat([slices[group] for group in self.groups])

    def broadcast(self, vector: Tensor) -> dict[str, Tensor]:
        """Tensor name -> the values of its units, shaped to broadcast against the tensor.

        By rank: [r, 1] for A [r, d_in] and [r] for B [d_out, r]; else one scalar for the tensor.
        """
        return {
            name: (values if ".lora_B." in name else values[:, None]) if self.by_rank else values[0]
            for group, values in self.split(vector).items()
            for name in self.groups[group]
        }


def _by_unit(name: str, value: Tensor, by_rank: bool) -> Tensor:
    """The scalars of each unit of one tensor, [units, scalars per unit]."""
    if not by_rank:
        return value.reshape(1, -1)
    return value.mT if ".lora_B." in name else value


def norm(x: Tensor) -> Tensor:
    """Norm(x) = (x - min) / (max - min); zeros if all values are equal."""
    low, high = x.aminmax()
    return torch.where(high > low, (x - low) / (high - low), 0)


def accumulate(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """Importance over all tasks so far: J_k = Norm(beta Norm(J_{k-1}) + (1 - beta) Norm(I_k))."""
    return norm(beta * norm(old) + (1 - beta) * norm(new))


def above_percentile(x: Tensor, percentile: float, strict: bool = True) -> Tensor:
    """Mask of the values above (`strict`) or at least at their percentile, linearly interpolated between ranks."""
    threshold = torch.quantile(x, percentile / 100)
    return x > threshold if strict else x >= threshold


def above_quantile(x: Tensor, q: float, tensors: Sequence[Tensor] = ()) -> Tensor:
    """Mask of the values strictly above their quantile q, for vectors too long to be sorted (or for torch.quantile).

    A linearly interpolated quantile is between two neighbouring values, so exactly the values above the lower
    neighbour exceed it: selecting that neighbour gives the same mask. If `tensors` are sharded, x has no negative
    values and is of this rank's rows of them, and the quantile is over all.
    """
    count = sum(tensor.numel() for tensor in tensors) or len(x)
    return x > smallest(x, int(q * (count - 1)) + 1, tensors)


def adaptive(old: Tensor, new: Tensor, tau: float) -> Tensor:
    """Adaptive fusion, weight of the new value: sigmoid((new - old) / tau) of normalised importance."""
    return torch.sigmoid((new - old) / tau)


def static(old: Tensor, new: Tensor, gamma: float) -> Tensor:
    """Static fusion, weight of the new value from two masks: both 1 - gamma, old only 0, new only 1, neither 1/2."""
    weight = torch.full(old.shape, 0.5, dtype=torch.float64, device=old.device)
    weight[new & ~old], weight[old & ~new], weight[old & new] = 1.0, 0.0, 1 - gamma
    return weight


def fuse(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """weight new + (1 - weight) old, computed in at least fp32; rows that `old` does not have keep their new value.

    A head that grew during the task has more rows than before it.
    """
    exact = torch.promote_types(new.dtype, torch.float32)
    common = new if new.shape == old.shape else new[: len(old)]
    fused = torch.lerp(old.to(exact), common.to(exact), weight.to(exact)).to(new.dtype)
    return fused if common is new else torch.cat([fused, new[len(old) :]])


def orthogonality(factors: Sequence[Tensor], squared: bool = False) -> Tensor:
    """Mean of ||M M^T - I||_F (or its square) over matrices M [r, d]; the subgradient of a norm of 0 is 0.

    Matrices of equal shape are multiplied as one batch, because a model has hundreds of small factors.
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
