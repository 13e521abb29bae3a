"""A second set of values of trained tensors: a teacher from before a task, or a moving average."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from clpet.data.batches import Batch
from clpet.methods.base import Method
from clpet.runtime.sharding.network import swapped
from clpet.runtime.sharding.tensors import aligned, local


class SecondWeights:
    """Copies of a method's trained tensors, with which the model can be run in their place."""

    def __init__(self, method: Method, trained: Mapping[str, nn.Parameter]) -> None:
        self.method, self.trained = method, dict(trained)
        self.tensors = {name: value.detach().clone() for name, value in trained.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Forward passes inside use the second values, without dropout.

        A tensor that the method has replaced since, such as a head's that has grown, is left to the method: names are
        looked up in its parameters, and the copy has the size that the tensor had.
        """
        adapters, named = self.method.objective.adapters, {**self.trained, **self.method.named_parameters()}
        with swapped({name: named[name] for name in self.tensors}, self.tensors), adapters.evaluating():
            yield

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[terms, classes]: logits of the model with the second values; a head has the rows that it had then."""
        with self.active():
            return self.method.logits(batch)

    @torch.no_grad()
    def average(self, share: float) -> None:
        """theta' <- share theta' + (1 - share) theta, where theta' are the second values."""
        second = [local(value) for value in self.tensors.values()]
        torch._foreach_lerp_(second, [local(self.trained[name].detach()) for name in self.tensors], 1 - share)

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the trained tensors the second values."""
        for name, value in self.tensors.items():
            self.trained[name].copy_(value)

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the second values those of the trained tensors."""
        for name, value in self.tensors.items():
            value.copy_(self.trained[name])

    def state(self) -> dict[str, Tensor]:
        """Returns the second values by name."""
        return self.tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned."""
        values = {name: aligned(state[name], value) for name, value in self.tensors.items()}
        self.tensors = {name: values[name].to(value.device, copy=True) for name, value in self.tensors.items()}

    def count(self) -> int:
        """Number of scalars in the second values."""
        return sum(value.numel() for value in self.tensors.values())
