"""Cost of learning each task: examples and tokens passed through the network, time and memory."""

import contextlib
import resource
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypedDict

import torch

from clpet.data.batches import Batch
from clpet.models.adapters import Adapters
from clpet.models.flops import NetworkFlops
from clpet.runtime.distributed import get_world


@dataclass
class Cost:
    """Counters of one task. A pass with gradients counts as forward and backward; evaluation is counted separately.

    `forward_flops` and `backward_flops` are floating-point operations of training (clpet/models/flops.py).
    `reference_examples` are passes of the task's examples through a frozen reference model, contained in the forward
    counters; they are made by every rank.
    `cached_examples` are forward passes of training that an earlier run has done, with logits read from cache_dir.
    `steps` are optimiser steps; `skipped_steps` of them had a NaN or infinite loss or gradient.
    """

    seconds: float = 0.0
    forward_examples: int = 0
    backward_examples: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    reference_examples: int = 0
    validated_examples: int = 0
    evaluated_examples: int = 0
    cached_examples: int = 0
    steps: int = 0
    skipped_steps: int = 0
    peak_memory_mb: float = 0.0


# All other counters are summed over ranks.
MAX_OVER_RANKS = ("seconds", "steps", "skipped_steps", "peak_memory_mb", "reference_examples")


class EvaluationCost(TypedDict):
    """The cost of one evaluation."""

    evaluation_seconds: float
    evaluated_examples: int
    evaluation_memory_mb: float


Purpose = Literal["learned", "validated", "evaluated"]  # of passes through the network


class Meter:
    """Counts the passes through the network on a device since the last `take_learning` or `take_evaluation`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Sets all counters to 0; passes count as learning."""
        self.kind: Purpose = "learned"
        self.cost = Cost()
        self._since = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def counting(self, kind: Purpose) -> Iterator[None]:
        """Passes in this block count as `kind`. After an error they still do: its message depends on the purpose."""
        before, self.kind = self.kind, kind
        yield
        self.kind = before

    def count(self, batch: Batch, forward_flops: float, backward_flops: float | None) -> None:
        """Adds one pass of a batch, with a backward pass unless `backward_flops` is None; padding counts as tokens."""
        if self.kind != "learned":
            name = f"{self.kind}_examples"
            setattr(self.cost, name, getattr(self.cost, name) + len(batch))
            return
        self.cost.forward_examples += len(batch)
        self.cost.forward_tokens += batch.tokens
        self.cost.forward_flops += forward_flops
        if backward_flops is not None:
            self.count_backward(batch, backward_flops)

    def count_backward(self, batch: Batch, flops: float, times: int = 1) -> None:
        """Adds backward passes of a batch, each of `flops` operations."""
        self.cost.backward_examples += times * len(batch)
        self.cost.backward_tokens += times * batch.tokens
        self.cost.backward_flops += times * flops

    def cached(self, examples: int) -> None:
        """Adds forward passes that were saved because an earlier run has cached their results."""
        if self.kind == "learned":
            self.cost.cached_examples += examples

    def state(self) -> dict[str, float]:
        """The counters of training so far, over all ranks."""
        peak = max(self.cost.peak_memory_mb, peak_memory_mb(self.device))
        local = {**asdict(self.cost), "seconds": time.perf_counter() - self._since, "peak_memory_mb": peak}
        ranks = get_world().gather(local)
        return {name: (max if name in MAX_OVER_RANKS else sum)(rank[name] for rank in ranks) for name in local}

    def load(self, state: Mapping[str, float]) -> None:
        """Continues from a state: passes repeated after a resume are not counted twice."""
        counters = state if get_world().is_main else {name: state.get(name, 0) for name in MAX_OVER_RANKS}
        self.cost = Cost(**counters)  # type: ignore[arg-type]  # the numbers of `state`, in which counts are integers
        self._since = time.perf_counter() - self.cost.seconds

    def take_learning(self) -> dict[str, float]:
        """Returns the counters of training since the last call and resets them."""
        taken = self.state()
        self.restart()
        return taken

    def take_evaluation(self) -> EvaluationCost:
        """Returns seconds and examples of the evaluation since the last call and resets the counters."""
        taken: EvaluationCost = {
            "evaluation_seconds": time.perf_counter() - self._since,
            "evaluated_examples": sum(get_world().gather(self.cost.evaluated_examples)),
            "evaluation_memory_mb": max(get_world().gather(peak_memory_mb(self.device))),
        }
        self.restart()
        return taken


class FlopsOfPasses:
    """The operations of passes through the network of an objective, counted when its state has changed."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.prompt_vectors = 0  # of the method, in front of each text of the latest pass
        self.renew()

    def renew(self) -> None:
        """Counts the network again at the next pass: other tensors may be trained than before."""
        self.counted: tuple[Hashable, NetworkFlops] | None = None

    @property
    def network(self) -> NetworkFlops:
        """The operations by the shape of a pass."""
        key = (self.adapters.active, len(self.adapters.names), self.prompt_vectors)
        if self.counted is None or self.counted[0] != key:
            self.counted = key, self.adapters.flops(self.prompt_vectors)
        return self.counted[1]


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of a GPU since the last task; of a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
