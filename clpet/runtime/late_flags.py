"""Flags that a device computes and a CPU reads without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LateFlags:
    """Flags that are computed on a device: read at once on a CPU, and on a GPU when the next ones are put.

    By then they have long been copied, so that the CPU never waits for work that it has just given to the GPU.
    """

    def __init__(self) -> None:
        self.values: Sequence[bool] = ()
        self.copied: tuple[Tensor, torch.cuda.Event] | None = None

    def put(self, flags: Tensor) -> None:
        """Gives the newest flags; `values` are these, or those before them."""
        if flags.device.type != "cuda":
            self.values = [bool(flag) for flag in flags.tolist()]
            return
        if self.copied:
            host, event = self.copied
            event.synchronize()
            self.values = [bool(flag) for flag in host.tolist()]
        host, event = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(flags, non_blocking=True)
        event.record()
        self.copied = (host, event)
