"""How the rows of a batch are divided into micro-batches: by a number of examples, and by a number of padded tokens."""

from dataclasses import dataclass

import numpy as np

from clpet.data.batches import EncodedDataset
from clpet.errors import ConfigError


@dataclass(frozen=True)
class MicroBatchLimits:
    """A micro-batch has at most `examples` rows and, with its padding, at most `tokens` tokens; None: no limit.

    A step's gradient does not depend on the division, except for rounding.
    """

    examples: int | None = None
    tokens: int | None = None

    def check(self, pool: EncodedDataset) -> None:
        """Raises ConfigError for a row that is longer than `tokens`."""
        longest = max((pool.padded_tokens(np.array([row])) for row in np.argsort(-pool.lengths)[:1]), default=0)
        if self.tokens is not None and longest > self.tokens:
            raise ConfigError(
                f"hardware.max_tokens={self.tokens}, but the longest training example has {longest} tokens: set "
                f"hardware.max_tokens={longest} or more, or lower benchmark.max_length"
            )

    def divide(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """The rows as micro-batches."""
        return [rows[positions] for positions in self.groups(pool, rows)]

    def groups(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """The same as positions in `rows`: in their order, or with a limit of tokens the longest rows first."""
        if self.tokens is None:
            size = self.examples or max(1, len(rows))
            return [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        groups: list[list[int]] = []
        for position in np.argsort(-pool.lengths[rows], kind="stable").tolist():
            grown = [*groups[-1], position] if groups else []
            fits = grown and len(grown) <= (self.examples or len(rows))
            if fits and pool.padded_tokens(rows[grown]) <= self.tokens:
                groups[-1] = grown
            else:
                groups.append([position])
        return [np.array(group) for group in groups]
