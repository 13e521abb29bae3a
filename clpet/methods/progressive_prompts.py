"""Progressive Prompts: each task prepends a new prompt to the frozen prompts of earlier tasks.

Razdaibiedina et al., 2023, arXiv 2301.12314. In task t the input is [P_t; P_{t-1}; ...; P_1; e(x)], and only P_t is
trained, L = CE. Optionally P_t is reparametrised as P_t + MLP(P_t) during training.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Benchmark, Task
from clpet.methods.prompts import Prompts
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.training.trainer import Trainer


@dataclass
class ProgressivePrompts(Prompts):
    """Prepends all prompts at test; with task_id_at_test=true only those of the example's task and the tasks before it.

    The paper trains with Adam, learning rate 0.3, weight decay 1e-5, batch size 8 and 10 epochs.
    """

    length: int = 10
    mlp: int = 0
    task_id_at_test: bool = False

    saved: ClassVar[tuple[str, ...]] = ("frozen=prompts.frozen", "new=prompts.new")
    saved_uncounted: ClassVar[tuple[str, ...]] = ("mlp_state=prompts.mlp",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mlp >= 0, "method.mlp", self.mlp, "0 (off) or the width of its hidden layer")

    def reserved_positions(self, benchmark: Benchmark) -> int:
        return self.length * len(benchmark)

    def init_adapters(self) -> None:
        super().init_adapters()
        self.frozen: list[Tensor] = []  # P_1 .. P_{t-1}
        self.new = nn.Parameter(self.from_vocabulary(0))  # P_t; empty in row 0
        self.reparametrisation: nn.Module | None = None
        self.num_prompts: int | None = None  # number of prompts used, oldest first; None: all

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if len(self.new):
            self.frozen.append(self.newest().detach())
        self.new = nn.Parameter(self.from_vocabulary(self.length, index))
        self.reparametrisation = self.network(index) if self.mlp else None
        super().learn(task, index, trainer)

    def network(self, index: int) -> nn.Module:
        """The MLP of a task: d -> mlp -> d with tanh in between."""
        torch.manual_seed(derive(self.seed, "mlp", index))
        dim = self.new.shape[1]
        return nn.Sequential(nn.Linear(dim, self.mlp), nn.Tanh(), nn.Linear(self.mlp, dim)).to(self.objective.device)

    @property
    def mlp_state(self) -> dict[str, Tensor]:
        """Tensors of the newest prompt's MLP; empty without one. Assigning them builds it."""
        return {} if self.reparametrisation is None else dict(self.reparametrisation.state_dict())

    @mlp_state.setter
    def mlp_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self.reparametrisation = self.network(len(self.frozen))
            self.reparametrisation.load_state_dict(tensors)

    def newest(self) -> Tensor:
        """P_t, or P_t + MLP(P_t)."""
        return self.new if self.reparametrisation is None else self.new + self.reparametrisation(self.new)

    def prompt(self, batch: Batch) -> Tensor:
        oldest_first = [*self.frozen, self.newest()][: self.num_prompts]
        return torch.cat(oldest_first[::-1]).expand(len(batch), -1, -1)

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        if choices.tasks is None:
            return super().predict(batch, choices)
        by_task = []
        for index in choices.tasks.unique().tolist():
            rows = (choices.tasks == index).nonzero().squeeze(1)
            self.num_prompts = index + 1
            by_task.append((rows, super().predict(batch.select(rows), choices)))
        self.num_prompts = None
        return Predictions.from_parts(by_task)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        task = len(self.frozen)
        mlp = {} if self.reparametrisation is None else dict(self.reparametrisation.named_parameters())
        prompt = {f"prompt{task}": self.new, **{f"mlp{task}.{name}": value for name, value in mlp.items()}}
        return {**prompt, **self.objective.parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"task{index:03d}": prompt for index, prompt in enumerate([*self.frozen, self.newest()])}
