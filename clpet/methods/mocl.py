"""MoCL: LoRA modules weighted by the similarity of an input's query to their task vectors (Wang et al., 2024, NAACL).

h = W x + sum_i w_i s B_i A_i x with c_i = cos(q(x), v_i) and w = softmax(scale c) or w = c;
L = CE + matching mean(1 - c_t), which trains the task vector v_t towards the queries of its task.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.methods.components.features import hidden_states, mean_pool
from clpet.methods.inc_lora import IncLoRA
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Compose(Enum):
    """Weights of the modules: w = softmax(scale c), or w = c."""

    softmax = "softmax"
    direct = "direct"


@dataclass
class MoCL(IncLoRA):
    """q(x) is the mean last hidden state of the bare backbone; that of a train row is computed once per task.

    task_id_at_test=true composes only the modules of an example's task and of the tasks before it.
    """

    compose: Compose = Compose.softmax
    scale: float = 8.0
    matching: float = 1.0
    task_id_at_test: bool = False

    mergeable: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = ("keys",)

    def __post_init__(self) -> None:
        require(self.scale > 0, "method.scale", self.scale, "more than 0")
        require(self.matching >= 0, "method.matching", self.matching, "0 (off) or more")

    def ineffective(self) -> dict[str, str]:
        softmax = self.compose is Compose.softmax
        return {} if softmax else {"method.scale": "it is for method.compose=softmax"}

    def init_adapters(self) -> None:
        super().init_adapters()
        self.keys = nn.ParameterList()  # v_1 .. v_t; only the last one is trained
        self.query_row = torch.full((len(self.data.train),), -1)  # train row -> row of `queries`

    def add_branch(self, index: int) -> None:
        super().add_branch(index)
        generator = torch.Generator().manual_seed(derive(self.seed, "key", index))
        key = torch.rand(self.objective.dim, generator=generator).to(self.objective.device)
        for old in self.keys:
            old.requires_grad_(False)
        self.keys.append(nn.Parameter(key))

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        rows = self.data.train.rows_of(index)
        self.query_row[rows] = torch.arange(len(rows))
        self.queries = self.embed(rows, self.query)
        super().learn(task, index, trainer)

    def query(self, batch: Batch) -> Tensor:
        """[batch, dim]: q(x)."""
        with self.stack.off():
            states = hidden_states(self.objective.adapters.model, batch)
        self.objective.count(batch, gradient=False)  # this pass does not go through the objective, which counts its own
        return mean_pool(states, batch.attention_mask)

    def cosines(self, queries: Tensor) -> Tensor:
        """[batch, n]: c_i = cos(q, v_i) of queries [batch, dim]."""
        return F.normalize(queries, dim=1) @ F.normalize(torch.stack([*self.keys]), dim=1).T

    def route(self, batch: Batch) -> Tensor:
        return self.branch_weights(self.cosines(self.query(batch)), batch.tasks if self.task_id_at_test else None)

    def branch_weights(self, cosines: Tensor, tasks: Tensor | None = None) -> Tensor:
        """[batch, n]: w; if `tasks` [batch] are given, modules of later tasks get weight 0."""
        direct = self.compose is Compose.direct
        if tasks is not None:
            later = torch.arange(cosines.shape[1], device=cosines.device) > tasks[:, None]
            cosines = cosines.masked_fill(later, 0 if direct else float("-inf"))
        return cosines if direct else (self.scale * cosines).softmax(1)

    def loss(self, context: StepContext) -> Tensor:
        batch = context.batch
        rows = self.query_row[torch.from_numpy(batch.rows)].to(self.queries.device, non_blocking=True)
        cosines = self.cosines(self.queries[rows])
        loss = self.routed_loss(batch, self.branch_weights(cosines))
        return loss + self.matching * (1 - cosines[:, -1]).mean()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().named_parameters(), **{f"key{len(self.keys)}": key for key in self.keys[-1:]}}
