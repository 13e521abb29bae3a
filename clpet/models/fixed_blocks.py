"""Blocks of one fixed shape, in which a frozen network computes the same bits for an example every time.

Rounding depends on the shape of a batch, not on the other rows in it. If an example always passes through the network
in a block of the same shape, a cached output therefore equals a recomputed one.
"""

from collections.abc import Iterator

import numpy as np
import torch
import transformers

BLOCK_ROWS = 16  # examples per block
WIDTH_MULTIPLE = 8  # tokens; the width of a block is a multiple of it


def split_into_blocks(lengths: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in groups of at most BLOCK_ROWS of one width.

    Rows without padding form groups of their own: their mask is all ones, for which attention uses another kernel.
    """
    widths = block_widths(lengths)[rows]
    shapes = 2 * widths + (lengths[rows] == widths)
    for shape in np.unique(shapes):
        same = rows[shapes == shape]
        yield from (same[start : start + BLOCK_ROWS] for start in range(0, len(same), BLOCK_ROWS))


def rounding_platform(device: torch.device) -> list[str]:
    """Everything besides the shape that rounding depends on: the device and the libraries."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [device.type, kind, torch.__version__, transformers.__version__]


def block_widths(lengths: np.ndarray) -> np.ndarray:
    """The width of each row's block: its length rounded up, but at most the longest row of the pool."""
    widths: np.ndarray = np.minimum(-(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, lengths.max())
    return widths
