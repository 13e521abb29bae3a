"""DAPT: trains the base model on each domain separately, the baseline that continual pretraining has to beat.

P[j, j] of this run is the perplexity of M_0 trained on domain j alone (Gururangan et al., 2020, arXiv 2004.10964). For
the first domain it equals that of continual pretraining bit for bit.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from clpet.data.benchmark import Task
from clpet.methods.base import Method
from clpet.training.trainer import Trainer


@dataclass
class DAPT(Method):
    """Only row 0 and the diagonal of the matrix exist: a domain's model is discarded when the next one starts."""

    needs_plain_text: ClassVar[bool] = True

    def init_adapters(self) -> None:
        super().init_adapters()
        self.index = 0  # of the current domain
        self.start = {
            name: value.detach().clone() for name, value in self.objective.adapters.tensors("default").items()
        }

    def evaluable_tasks(self, row: int, tasks: range) -> range:
        return range(row - 1, row) if row else tasks

    def named_parameters(self) -> dict[str, nn.Parameter]:
        # Names per domain, so that no optimiser state is carried from one domain to the next.
        return {f"{self.index}.{name}": value for name, value in super().named_parameters().items()}

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.index = index
        self.objective.adapters.load("default", self.start)
        super().learn(task, index, trainer)
