"""Data parallelism: several processes (ranks) compute one run, each on its share of every batch, with equal weights.

Every rank executes the same code with the same plan of global batches, the same random numbers (except for dropout)
and the same decisions. Only the rows that a rank computes differ, and the results are summed or gathered before any
code uses them. Only the main rank (rank 0) writes files. In a single process every call here is a no-op.
"""

import contextlib
import datetime
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from clpet.errors import HostError
from clpet.runtime.late_flags import LateFlags

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Item = TypeVar("Item")
Result = TypeVar("Result")
Divide = Callable[[np.ndarray], list[np.ndarray]]  # rows -> micro-batches
BUCKET_NUMEL = 2**26  # gradient scalars per all-reduce
TIMEOUT = datetime.timedelta(hours=2)  # of a collective; `wait_for_main` has no limit
POLL = 0.1  # seconds between two questions whether the main rank is ready
UNREACHABLE = re.compile("clos|reset|refused|broken pipe|time.?out|timed out|0 bytes|exited|network|abort", re.I)

_run_numbers = itertools.count()  # of the process groups of this process


class LostRank(HostError):
    """Another rank has ended; that rank reports the cause itself."""


class World:
    """A single process; also the interface that `DistributedWorld` implements for several."""

    size, index = 1, 0
    sharded = False  # True: the backbone is sharded over the ranks, so all ranks must run each forward pass together
    mesh: "DeviceMesh | None" = None  # the ranks over which trained weights are sharded, if they are

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.index == 0

    def micro_batches(self, rows: np.ndarray, divide: Divide) -> list[tuple[np.ndarray, bool]]:
        """This rank's rows of a batch in the micro-batches of `divide`, each with whether it counts.

        With a sharded backbone every rank must run equally many forward passes. A rank without rows left repeats the
        first row of the batch, which then does not count in loss or gradient.
        """
        by_rank = [divide(rows_of_rank(rows, rank, self.size)) for rank in range(self.size if self.sharded else 0)]
        mine = by_rank[self.index] if by_rank else divide(rows_of_rank(rows, self.index, self.size))
        num_passes = max(map(len, by_rank), default=len(mine))
        return [*((micro_batch, True) for micro_batch in mine), *[(rows[:1], False)] * (num_passes - len(mine))]

    def sum_gradients(self, parameters: Sequence[nn.Parameter], mean: Tensor, requests: Sequence[bool] = ()) -> None:
        """Replaces the gradients and the loss `mean` by their sums over ranks, in one reduction.

        A parameter that has a gradient on any rank has one on all ranks afterwards. `requests` are what this rank asks
        of all ranks; the same reduction carries them, and `agreed` returns the result.
        """

    def agreed(self, requests: Sequence[bool]) -> Sequence[bool]:
        """Which of the requests any rank had in the last `sum_gradients`; a single process has only its own, now.

        Between GPUs they are those of the step before: reading the newest would wait for the device.
        """
        return requests

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over ranks, in place."""

    def gather(self, value: Result) -> list[Result]:
        """Returns the value of every rank, ordered by rank; tensors are moved to the CPU if there are several ranks."""
        return [value]

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Returns [work(item) for item in items] on every rank; each rank computes some of them."""
        return [work(item) for item in items]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this rank computes, where results are summed by `sum_shares` afterwards."""
        return items

    def sum_shares(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over the ranks, in place, if each has computed its `share` alone."""

    @contextlib.contextmanager
    def local_only(self) -> Iterator[None]:
        """Inside this block ranks run different code: `map` computes all items locally, without communication."""
        yield

    def all_reduce_max(self, *numbers: float) -> tuple[float, ...]:
        """Returns the maximum over ranks of each number; ranks use it to reach a common decision."""
        return numbers

    def claim(self, name: str) -> bool:
        """Whether this rank is the first to call this with `name`; the others are not waited for."""
        return True

    def barrier(self) -> None:
        """Waits until all ranks have reached this call."""

    @contextlib.contextmanager
    def wait_for_main(self) -> Iterator[None]:
        """At its end the other ranks wait for the main one, which works alone in the block for as long as it takes."""
        yield

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on the main rank first, then on the others, which find its results in the caches.

        They also run it after an error of the main rank, which might be theirs as well.
        """
        yield


class DistributedWorld(World):
    """One rank of a process group of torch.distributed: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        cuda = device.type == "cuda"
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if cuda:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        with raise_on_lost_rank():
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun's store outlives a restart of its processes, and a process may join a second run.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = PrefixStore(f"{attempt}/{next(_run_numbers)}", store)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=self.store, rank=rank, world_size=size, timeout=TIMEOUT)
        self.size, self.index, self.dist = dist.get_world_size(), dist.get_rank(), dist
        self.threads = max(1, (os.cpu_count() or 1) // local_size)
        self.is_local = False  # inside `local_only`
        self.waits = itertools.count()
        self.requests = LateFlags()

    def close(self) -> None:
        """Leaves the process group."""
        self.dist.destroy_process_group()

    def reduce(self, tensor: Tensor, maximum: bool = False) -> None:
        """Replaces a tensor by its sum, or maximum, over ranks, in place."""
        with raise_on_lost_rank():
            self.dist.all_reduce(tensor, self.dist.ReduceOp.MAX if maximum else self.dist.ReduceOp.SUM)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], mean: Tensor, requests: Sequence[bool] = ()) -> None:
        """A parameter that no rank's loss reaches keeps grad=None, as in one process: the optimiser skips it.

        One buffer holds the loss, the requests, which parameters have a gradient, and all gradients. A rank without a
        gradient contributes zeros: all ranks must reduce the same list of tensors.
        """
        parameters = [value for value in parameters if not is_sharded(value)]  # FSDP has summed the others
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        has_gradient = [value.grad is not None for value in parameters]
        flags = mean.new_tensor([*requests, *has_gradient])
        self.sum([mean, flags, *gradients])
        self.requests.put(flags[: len(requests)])
        if not all(has_gradient):  # else every sum has a gradient on this rank, and nothing is read from the device
            reached = flags[len(requests) :].tolist()
            for parameter, gradient, ranks in zip(parameters, gradients, reached, strict=True):
                parameter.grad = gradient if ranks else None

    def agreed(self, requests: Sequence[bool]) -> Sequence[bool]:
        return self.requests.values

    def sum(self, tensors: Sequence[Tensor]) -> None:
        sum_flat(tensors, self.reduce)

    def gather(self, value: Result) -> list[Result]:
        values: list[Result | None] = [None] * self.size
        with raise_on_lost_rank():
            self.dist.all_gather_object(values, to_cpu(value))
        return cast(list[Result], values)

    @property
    def divides(self) -> bool:
        """Whether ranks may compute different items: not with a sharded backbone, whose passes need all ranks."""
        return not (self.is_local or self.sharded)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.index :: self.size] if self.divides else items

    def sum_shares(self, tensors: Sequence[Tensor]) -> None:
        if self.divides:
            self.sum(tensors)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        if not self.divides:
            return super().map(work, items)
        with self.local_only():
            local_results = [to_cpu(work(item)) for item in items[self.index :: self.size]]
        results = self.gather(local_results)  # [rank][n-th item of that rank]
        return [results[index % self.size][index // self.size] for index in range(len(items))]

    @contextlib.contextmanager
    def local_only(self) -> Iterator[None]:
        before, self.is_local = self.is_local, True
        try:
            yield
        finally:
            self.is_local = before

    def all_reduce_max(self, *numbers: float) -> tuple[float, ...]:
        values = torch.tensor(numbers, dtype=torch.float64)
        self.reduce(values, maximum=True)
        return tuple(values.tolist())

    def claim(self, name: str) -> bool:
        try:
            return bool(self.store.compare_set(f"claim/{name}", "", str(self.index)) == str(self.index).encode())
        except RuntimeError:  # the rank that has the store, or torchrun, has ended before this one
            return False

    def barrier(self) -> None:
        self.all_reduce_max(0)  # of a CPU tensor, so over gloo also between GPUs

    @contextlib.contextmanager
    def wait_for_main(self) -> Iterator[None]:
        key = f"main/{next(self.waits)}"
        try:
            yield
        finally:
            with raise_on_lost_rank():
                if self.is_main:
                    self.store.set(key, "ready")
                while not self.store.check([key]):
                    time.sleep(POLL)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        with self.wait_for_main():
            if self.is_main:
                yield
        if not self.is_main:
            yield


_world = World()


def get_world() -> World:
    """Returns the ranks that this process belongs to."""
    return _world


@contextlib.contextmanager
def init_distributed(device: torch.device, threads: int | None = None) -> Iterator[World]:
    """Inside the block this process is the rank given by RANK, WORLD_SIZE, LOCAL_RANK, ... in its environment.

    `threads` are its CPU threads; by default its share of the machine's cores.
    """
    global _world
    ranks, before = DistributedWorld(device), torch.get_num_threads()
    torch.set_num_threads(threads or min(before, ranks.threads))
    _world = ranks
    try:
        yield ranks
    finally:
        _world = World()
        torch.set_num_threads(before)
        ranks.close()


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Disables gradients for evaluation.

    Uses no_grad with a sharded backbone: FSDP cannot train with buffers that it created in inference mode.
    """
    with torch.no_grad() if get_world().sharded else torch.inference_mode():
        yield


@contextlib.contextmanager
def raise_on_lost_rank() -> Iterator[None]:
    """Raises LostRank where the other ranks cannot be reached, in the words of gloo, NCCL and the store."""
    try:
        yield
    except RuntimeError as error:
        if not UNREACHABLE.search(str(error)):
            raise
        raise LostRank(f"another rank of this run has ended ({str(error).splitlines()[0]})") from error


def rows_of_rank(rows: np.ndarray, index: int, size: int) -> np.ndarray:
    """Returns every size-th row of a batch, starting at `index`: counts and text lengths differ little across ranks."""
    return rows if size == 1 else rows[index::size]


@torch.no_grad()
def sum_flat(tensors: Iterable[Tensor], reduce: Callable[[Tensor], object], limit: int = BUCKET_NUMEL) -> None:
    """Applies `reduce` to tensors in place, packed into flat buffers of one dtype with at most `limit` scalars.

    A tensor larger than `limit` gets a buffer alone. Few large reductions are faster than one per tensor.
    """
    buckets: list[list[Tensor]] = []
    for tensor in sorted(tensors, key=lambda tensor: str(tensor.dtype)):
        last = buckets[-1] if buckets else []
        if not last or last[0].dtype != tensor.dtype or sum(t.numel() for t in last) + tensor.numel() > limit:
            buckets.append([])
        buckets[-1].append(tensor)
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        reduce(flat)
        for tensor, values in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(values.view_as(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds some rows only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor detached; a sharded one is gathered from all ranks, which must all make this call."""
    full: Callable[[], Tensor] = getattr(tensor.detach(), "full_tensor", tensor.detach)
    return full()


def to_cpu(node: Result) -> Result:
    """Returns nested dicts and lists with every tensor detached and on the CPU."""
    copy: object = node
    if isinstance(node, Tensor):
        copy = node.detach().cpu()
    elif isinstance(node, dict):
        copy = {key: to_cpu(value) for key, value in node.items()}
    elif isinstance(node, list | tuple):
        copy = type(node)(map(to_cpu, node))
    return cast(Result, copy)
