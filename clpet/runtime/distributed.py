"""Several processes (ranks) on one run: each computes its part of a batch, and all hold the same weights.

Every rank goes through the same code with the same plan of global batches, the same random numbers (dropout apart)
and the same decisions. Only what is computed on which rows differs, and that is summed or gathered before anyone
looks at it. Only the main rank writes. One process alone has a world of its own, in which all of this is nothing.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.errors import HostError

Part = TypeVar("Part")
Found = TypeVar("Found")
BUCKET_NUMEL = 2**26  # scalars of gradients that are summed at a time
TIMEOUT = datetime.timedelta(hours=2)  # for a rank that writes or reads alone while the others wait


class LostRank(HostError):
    """Another rank has ended, for a reason that it gives itself."""


class World:
    """One process alone."""

    size, index = 1, 0
    sharded = False  # the backbone is spread over the ranks: they must pass through it together

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.index == 0

    def micro_batches(self, rows: np.ndarray, micro: int | None) -> list[tuple[np.ndarray, bool]]:
        """This rank's part of a batch in micro-batches, each with whether it counts.

        Where the backbone is sharded every rank passes as often as the first one, which has the most rows: one
        that has none left takes the first row of the batch, which does not count.
        """
        parts = [(part, True) for part in chunks(split(rows, self.index, self.size), micro)]
        idle = len(chunks(split(rows, 0, self.size), micro)) - len(parts) if self.sharded else 0
        return [*parts, *[(rows[:1], False)] * idle]

    def sum_gradients(self, parameters: Sequence[nn.Parameter], mean: Tensor) -> None:
        """Gradients and the loss become their sums over ranks; a gradient that some rank has, all have."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Tensors become their sums over ranks."""

    def gather(self, value: Found) -> list[Found]:
        """Every rank's value; tensors come to the host where there are several ranks."""
        return [value]

    def map(self, work: Callable[[Part], Found], parts: Sequence[Part]) -> list[Found]:
        """[work(part) for part in parts] on every rank, each of which does some of them."""
        return [work(part) for part in parts]

    @contextlib.contextmanager
    def local_only(self) -> Iterator[None]:
        """What is inside differs from rank to rank: `map` does all by itself."""
        yield

    def all_reduce_max(self, *numbers: float) -> tuple[float, ...]:
        """The largest of every rank's numbers, place by place: how the ranks come to one decision."""
        return numbers

    def barrier(self) -> None:
        """Waits for all ranks."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank goes in alone, and the others after it: they find in the caches what it has made."""
        yield


class DistributedWorld(World):
    """This process among others, by torch.distributed: gloo on the host, NCCL between GPUs."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        cuda = device.type == "cuda"
        local, place = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"]
        if cuda:
            torch.cuda.set_device(local % torch.cuda.device_count())
        with raise_on_lost_rank():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        self.size, self.index, self.dist = dist.get_world_size(), dist.get_rank(), dist
        self.threads = max(1, (os.cpu_count() or 1) // int(place))
        self.alone = False

    def close(self) -> None:
        """Leaves the group."""
        self.dist.destroy_process_group()

    def reduce(self, tensor: Tensor, most: bool = False) -> None:
        """The sum, or the largest value, over ranks, in place."""
        with raise_on_lost_rank():
            self.dist.all_reduce(tensor, self.dist.ReduceOp.MAX if most else self.dist.ReduceOp.SUM)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], mean: Tensor) -> None:
        """What no rank's loss reaches stays without a gradient, as on one rank: the optimiser passes it over."""
        known = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        self.reduce(known, most=True)
        found = [mean]
        for parameter, reached in zip(parameters, known.tolist(), strict=True):
            if reached:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found.append(parameter.grad)
        self.sum(found)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        sum_flat(tensors, self.reduce)

    def gather(self, value: Found) -> list[Found]:
        found: list[Any] = [None] * self.size
        with raise_on_lost_rank():
            self.dist.all_gather_object(found, to_cpu(value))
        return found

    def map(self, work: Callable[[Part], Found], parts: Sequence[Part]) -> list[Found]:
        if self.alone or self.sharded:
            return super().map(work, parts)
        with self.local_only():
            own = [to_cpu(work(part)) for part in parts[self.index :: self.size]]
        found = self.gather(own)
        return [found[place % self.size][place // self.size] for place in range(len(parts))]

    @contextlib.contextmanager
    def local_only(self) -> Iterator[None]:
        before, self.alone = self.alone, True
        try:
            yield
        finally:
            self.alone = before

    def all_reduce_max(self, *numbers: float) -> tuple[float, ...]:
        values = torch.tensor(numbers, dtype=torch.float64)
        self.reduce(values, most=True)
        return tuple(values.tolist())

    def barrier(self) -> None:
        self.all_reduce_max(0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


_world = World()


def get_world() -> World:
    """The ranks that this process belongs to."""
    return _world


@contextlib.contextmanager
def init_distributed(device: torch.device, threads: int | None = None) -> Iterator[World]:
    """Inside, this process is the rank that its environment says (RANK, WORLD_SIZE, ...), on its share of the cores."""
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
    """For passes that only judge. FSDP cannot train with the buffers that it makes in torch's inference mode."""
    with torch.no_grad() if get_world().sharded else torch.inference_mode():
        yield


@contextlib.contextmanager
def raise_on_lost_rank() -> Iterator[None]:
    """Raises LostRank where the other ranks cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(f"another rank of this run has ended ({str(error).splitlines()[0]})") from error


def split(rows: np.ndarray, index: int, size: int) -> np.ndarray:
    """A rank's rows of a batch: every size-th one, so that neither counts nor lengths differ by much."""
    return rows if size == 1 else rows[index::size]


def chunks(rows: np.ndarray, size: int | None) -> list[np.ndarray]:
    """The rows in parts of at most `size`, or in one."""
    size = size or max(1, len(rows))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def sum_flat(tensors: Iterable[Tensor], reduce: Callable[[Tensor], object], limit: int = BUCKET_NUMEL) -> None:
    """Applies `reduce` to tensors in place by way of flat buffers of one dtype, of `limit` scalars or one tensor."""
    buckets: list[list[Tensor]] = []
    for tensor in sorted(tensors, key=lambda one: str(one.dtype)):
        last = buckets[-1] if buckets else []
        if not last or last[0].dtype != tensor.dtype or sum(t.numel() for t in last) + tensor.numel() > limit:
            buckets.append([])
        buckets[-1].append(tensor)
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, detached; of a sharded one all parts, for which all ranks have to ask."""
    full = getattr(tensor.detach(), "full_tensor", tensor.detach)
    return full()


def to_cpu(node: Any) -> Any:
    """A tree whose tensors lie in the host's memory."""
    if isinstance(node, Tensor):
        return node.detach().cpu()
    if isinstance(node, dict):
        return {key: to_cpu(value) for key, value in node.items()}
    return type(node)(map(to_cpu, node)) if isinstance(node, list | tuple) else node
