"""Values of some rows of a pool, computed once and looked up by row."""

import numpy as np
import torch
from torch import Tensor


class RowTable:
    """`values` [len(rows), ...] of the given rows of a pool with `size` rows."""

    def __init__(self, rows: np.ndarray, values: Tensor, size: int) -> None:
        self.values = values
        self.position = torch.full((size,), -1)  # row of the pool -> row of `values`
        self.position[rows] = torch.arange(len(rows))

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return self.values[self.position[torch.from_numpy(rows)].to(self.values.device)]
