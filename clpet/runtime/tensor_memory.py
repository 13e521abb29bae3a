"""The memory of tensors: on a CPU the bytes of those alive, on a GPU what its allocator counts."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clpet.runtime.sharding.tensors import is_dtensor


class TensorsAlive(TorchDispatchMode):
    """Follows the storages of all tensors that operations read or write inside the block, until they are freed.

    `bytes` is their present size and `peak` the largest since `reset`. Storages count from their first use on;
    those that are freed outside of a block are noticed too. Every operation takes some 20 microseconds longer.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self.references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset(self) -> None:
        """Starts a new peak."""
        self.peak = self.bytes

    def add(self, node: object) -> None:
        """Counts the tensors of nested lists and dicts that are not counted yet."""
        if isinstance(node, Tensor):
            self._add_storage(node)
        elif isinstance(node, Mapping):
            self.add(list(node.values()))
        elif isinstance(node, Sequence) and not isinstance(node, str):
            for item in node:
                self.add(item)

    def _add_storage(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        if is_dtensor(tensor):  # its own storage has a size as if it held all rows, but memory has those of this rank
            with torch.no_grad():
                tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        number = id(storage)  # torch gives a storage one Python object for as long as it exists
        if number in self.references:
            return
        size = storage.nbytes()

        def freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            if self.references.get(number) is reference:
                del self.references[number]
                self.bytes -= size

        self.references[number] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        self.add(args)
        self.add(named)
        result = func(*args, **named)
        self.add(result)
        return result


class PeakMemory:
    """Measures peak memory on a device. On a CPU only between `start` and `stop`, because measuring takes time."""

    def __init__(self, device: torch.device) -> None:
        self.alive = None if device.type == "cuda" else TensorsAlive()
        self.active = False

    @property
    def takes_time(self) -> bool:
        """Whether operations take longer while memory is measured."""
        return self.alive is not None

    def hold(self, module: nn.Module) -> None:
        """Counts the tensors of a module, which exist before the first operation."""
        if self.alive:
            self.alive.add([*module.parameters(), *module.buffers()])

    def start(self) -> None:
        """Starts to measure; a peak that was measured before remains."""
        if self.alive and not self.active:
            self.alive.__enter__()  # type: ignore[no-untyped-call]
            self.active = True

    def stop(self) -> None:
        """Stops to measure, so that operations take their usual time."""
        if self.alive and self.active:
            self.active = False
            self.alive.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Starts a new peak."""
        if self.alive:
            self.alive.reset()
        else:
            torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        """Bytes in use."""
        return self.alive.bytes if self.alive else torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        """The most bytes in use since `reset`."""
        return self.alive.peak if self.alive else torch.cuda.max_memory_allocated()
