"""Blocks of one shape, in which a frozen network gives an example the same bits every time."""

from collections.abc import Iterator

import numpy as np
import torch
import transformers

BLOCK = 16  # examples in a block
STEP = 8  # a block's width is a multiple of it


def blocks(lengths: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in parts of at most BLOCK of one shape; rows without padding, whose mask is all ones, stay apart."""
    widths = block_widths(lengths)[rows]
    shapes = 2 * widths + (lengths[rows] == widths)
    for shape in np.unique(shapes):
        same = rows[shapes == shape]
        yield from (same[start : start + BLOCK] for start in range(0, len(same), BLOCK))


def platform(device: torch.device) -> list[str]:
    """What rounding depends on: the device and the libraries."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [device.type, kind, torch.__version__, transformers.__version__]


def block_widths(lengths: np.ndarray) -> np.ndarray:
    """The width of each row's block: its length rounded up, at most the longest row of the pool."""
    return np.minimum(-(-lengths // STEP) * STEP, lengths.max())
