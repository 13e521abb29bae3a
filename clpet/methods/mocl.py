"""MoCL: modules composed by how well an input's query matches the task vectors (Wang et al., 2024, NAACL).

c_i = cos(q(x), v_i), w = softmax(8 c) or w = c, h = W x + sum_i w_i s B_i A_i x; L = CE + mean(1 - c_t).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.features import hidden_states, mean_pool
from clpet.methods.inc_lora import IncLoRA
from clpet.training.trainer import Trainer


class Compose(Enum):
    """How cosines become weights."""

    softmax = "softmax"
    direct = "direct"


@dataclass
class MoCL(IncLoRA):
    """q(x) is the mean last hidden state of the bare backbone, so that of a train row is computed once a task.

    task_id_at_test=true composes the modules of an example's own task and of those before it only.
    """

    compose: Compose = Compose.softmax
    scale: float = 8.0
    matching: float = 1.0
    task_id_at_test: bool = False

    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.scale > 0, "method.scale", self.scale, "more than 0")
        require(self.matching >= 0, "method.matching", self.matching, "0 (off) or more")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.keys: list[nn.Parameter] = []  # the last one is trained
        self.place = torch.full((len(self.data.train),), -1)

    def add_branch(self, index: int) -> None:
        super().add_branch(index)
        generator = torch.Generator().manual_seed(derive(self.seed, "key", index))
        key = torch.rand(self.objective.dim, generator=generator).to(self.objective.device)
        for old in self.keys:
            old.requires_grad_(False)
        self.keys.append(nn.Parameter(key))

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        rows = self.data.train.rows_of(index)
        self.place[rows] = torch.arange(len(rows))
        self.queries = self.embed(rows, self.query)
        super().learn(task, index, trainer)

    def query(self, batch: Batch) -> Tensor:
        """[batch, dim]: q(x)."""
        self.objective.meter.count(batch, False)
        with self.increments.off():
            return mean_pool(hidden_states(self.objective.adapters.model, batch), batch.attention_mask)

    def cosines(self, queries: Tensor) -> Tensor:
        """[batch, n]: c_i."""
        return F.normalize(queries, dim=1) @ F.normalize(torch.stack([*self.keys]), dim=1).T

    def route(self, batch: Batch) -> Tensor:
        return self.weigh(self.cosines(self.query(batch)), batch.tasks if self.task_id_at_test else None)

    def weigh(self, cosines: Tensor, tasks: Tensor | None = None) -> Tensor:
        """[batch, n]: w; with `tasks` given, later modules than an example's own have no weight."""
        direct = self.compose is Compose.direct
        if tasks is not None:
            later = torch.arange(cosines.shape[1], device=cosines.device) > tasks[:, None]
            cosines = cosines.masked_fill(later, 0 if direct else float("-inf"))
        return cosines if direct else (self.scale * cosines).softmax(1)

    def loss(self, batch: Batch) -> Tensor:
        place = self.place[torch.from_numpy(batch.rows)].to(self.queries.device, non_blocking=True)
        cosines = self.cosines(self.queries[place])
        loss = self.mixed_loss(batch, self.weigh(cosines))
        return loss + self.matching * (1 - cosines[:, -1]).mean()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().named_parameters(), **{f"key{len(self.keys)}": key for key in self.keys[-1:]}}

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(key.numel() for key in self.keys)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "keys": self.keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.keys = [nn.Parameter(key.to(self.objective.device)) for key in state["keys"]]
