"""What learning costs: examples and tokens through the network, time and memory, task by task."""

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clpet.data.batches import Batch
from clpet.runtime.distributed import get_world


@dataclass
class Cost:
    """Counters of one task. A forward with gradients counts as forward and backward; evaluation counts apart.

    `cached_examples` are forwards of training that an earlier run has done: their logits were read from cache_dir.
    `skipped_steps` were left out because their loss or gradient was no number.
    """

    seconds: float = 0.0
    forward_examples: int = 0
    backward_examples: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    validated_examples: int = 0
    evaluated_examples: int = 0
    cached_examples: int = 0
    skipped_steps: int = 0
    peak_memory_mb: float = 0.0


SAME = ("seconds", "skipped_steps", "peak_memory_mb")  # of several ranks the largest; all else adds up


class Meter:
    """Counts what goes through the network since the last `take`."""

    def __init__(self) -> None:
        self.kind = "learned"  # learned | validated | evaluated: what the passes are for
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted so far."""
        self.cost = Cost()
        self._since = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def count(self, batch: Batch, gradient: bool) -> None:
        """Adds one pass of a batch; places of padding count as tokens, since they are computed."""
        if self.kind != "learned":
            name = f"{self.kind}_examples"
            setattr(self.cost, name, getattr(self.cost, name) + len(batch))
            return
        self.cost.forward_examples += len(batch)
        self.cost.forward_tokens += batch.tokens
        if gradient:
            self.cost.backward_examples += len(batch)
            self.cost.backward_tokens += batch.tokens

    def cached(self, examples: int) -> None:
        """Notes forwards that need not be done because an earlier run has done them."""
        if self.kind == "learned":
            self.cost.cached_examples += examples

    def state(self) -> dict[str, Any]:
        """The counters of training so far, of all ranks."""
        peak = max(self.cost.peak_memory_mb, peak_memory_mb())
        mine = {**asdict(self.cost), "seconds": time.perf_counter() - self._since, "peak_memory_mb": peak}
        ranks = get_world().gather(mine)
        return {name: (max if name in SAME else sum)(one[name] for one in ranks) for name in mine}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state: what was done again since then is not counted twice."""
        self.cost = Cost(**(state if get_world().is_main else {name: state[name] for name in SAME}))
        self._since = time.perf_counter() - self.cost.seconds

    def take_learning(self) -> dict[str, Any]:
        """The counters of training since the last call, and starts anew."""
        taken = self.state()
        self.restart()
        return taken

    def take_evaluation(self) -> dict[str, Any]:
        """Seconds and examples of the evaluation since the last call, and starts anew."""
        taken = {
            "evaluation_seconds": time.perf_counter() - self._since,
            "evaluated_examples": sum(get_world().gather(self.cost.evaluated_examples)),
        }
        self.restart()
        return taken


def peak_memory_mb() -> float:
    """Peak device memory since the last task on a GPU; the process's peak resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
