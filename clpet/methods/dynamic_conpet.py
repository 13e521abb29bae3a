"""Dynamic ConPET (Song et al., 2023, arXiv 2309.14763): a module per task and a selector that routes to the top K.

Per task k >= 2: first the selector, then module k. Both train on dynamic batches, half new and half old, so
the cost of a task does not depend on how many came before. Notation of the specification's section 3.7.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config import derive, require
from clpet.errors import ConfigError
from clpet.memory import Plan
from clpet.methods.base import Choices, Predictions
from clpet.methods.modular import Modular, module_name
from clpet.objectives.classification import MISSING, Head
from clpet.tasks import Benchmark, Task
from clpet.text import Batch
from clpet.training import Trainer


class WarmStart(Enum):
    """Where module k's adapter starts: a new draw, module k-1, or the current selector."""

    scratch = "scratch"
    previous = "previous"
    selector = "selector"


@dataclass
class DynamicConPET(Modular):
    """Modules {LoRA_j, head_j}, frozen after their task; one selector {LoRA_sel, head_sel over tasks}."""

    top_k: int = 1
    teacher_forcing: bool = True
    warm_start: WarmStart = WarmStart.scratch
    selector_clip: float = 1.0

    uses_replay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "method.top_k", self.top_k, "at least 1")
        require(self.selector_clip >= 0, "method.selector_clip", self.selector_clip, "0 (off) or more")

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError("method=dynamic_conpet trains its selector on old examples: replay=dynamic or replay=all")

    def check_benchmark(self, benchmark: Benchmark) -> None:
        if self.warm_start is WarmStart.selector and self.top_k >= len(benchmark):
            raise ConfigError(f"method.warm_start=selector, but with top_k={self.top_k} there is no selector")

    def first_adapter(self) -> None:
        super().first_adapter()
        self.selector = self.objective.new_head(self.seed, [f"task {name}" for name in self.benchmark.names])
        self.selector.grow([0])
        pool = self.data.train
        self.cache = LogitCache(len(pool))
        self.ranking = np.full((len(pool), self.top_k), -1)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.ranking[:] = -1  # what the selector chose for train rows holds within one task
        if index > 0 and self.top_k < len(self.benchmark):
            self.learn_selector(index, trainer)
        self.add_module(index)
        if index > 0 and self.warm_start is not WarmStart.scratch:
            source = module_name(index - 1) if self.warm_start is WarmStart.previous else "selector"
            self.objective.adapters.copy(source, module_name(index))
        self.fit(trainer, index)

    # The selector: L_sel = -(1/B) sum_i log softmax(head_sel(h_sel(x_i)))[task(y_i)]

    def learn_selector(self, index: int, trainer: Trainer) -> None:
        """Old rows of the head and LoRA_sel go on from the previous selector; row k starts fresh."""
        adapters = self.objective.adapters
        if "selector" not in adapters.names:
            adapters.add("selector", derive(self.seed, "adapter", "selector"))
        adapters.activate("selector", train=True)
        self.selector.grow([index])
        trainer.fit(
            self.replay.plan(index, "selector"),
            self.selector_loss,
            [*adapters.tensors("selector").values(), *self.selector.parameters()],
            stage="selector",
            clip=self.selector_clip,
            validate=lambda: self.selector_accuracy(index),
        )

    def selector_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over task numbers."""
        return F.cross_entropy(self.selector(self.objective.features(batch)), batch.tasks)

    def select(self, batch: Batch) -> Tensor:
        """[batch, min(K, modules)]: task numbers by falling selector score; all modules when K covers them."""
        modules = len(self.modules)
        if self.top_k >= modules:
            return torch.arange(modules, device=batch.labels.device).expand(len(batch), modules)
        with self.objective.adapters.using("selector"):
            return self.selector(self.objective.features(batch)).topk(self.top_k, dim=1).indices

    def selector_accuracy(self, index: int) -> float:
        """Average over tasks of the share of validation examples sent to their own task."""

        def right(batch: Batch) -> Tensor:
            return self.selector(self.objective.features(batch)).argmax(1) == batch.tasks

        return self.average_score(self.replay.validation(index), right)

    # Module k: logits of the selected modules over Y_{1:k}, -100 elsewhere; cross-entropy.

    def plan(self, index: int) -> Plan:
        """With K = 1 an old example meets only a frozen module and gives no gradient: it is not computed at all."""
        plan = self.replay.plan(index, "module")
        if self.top_k > 1:
            return plan
        return dataclasses.replace(plan, keep=lambda rows: plan.pool.tasks[rows] == index)

    def stages(self, index: int) -> dict[str, Plan]:
        selector = {"selector": self.replay.plan(index, "selector")}
        return {**(selector if index > 0 and self.top_k < len(self.benchmark) else {}), "module": self.plan(index)}

    def loss(self, batch: Batch) -> Tensor:
        """K = 1: plain cross-entropy inside Y_k. K > 1: cross-entropy over the union of the selected modules."""
        if self.top_k == 1 or len(self.modules) == 1:
            return super().loss(batch)
        z = self.union_logits(batch, self.select_training(batch))
        return F.cross_entropy(z, batch.labels)

    def union_logits(self, batch: Batch, selected: Tensor) -> Tensor:
        """[batch, all labels]: gradient only through the newest module; labels not seen yet at minus infinity."""
        newest = len(self.modules) - 1
        z = torch.full((len(batch), len(self.benchmark.labels)), float("-inf"), device=batch.labels.device)
        z[:, self.benchmark.seen_labels(newest + 1)] = MISSING
        for index in selected.unique().tolist():
            keep = (selected == index).any(1).nonzero().squeeze(1)
            part = batch.select(keep)
            place = keep[:, None], torch.as_tensor(self.modules[index].labels, device=keep.device)
            logits = self.frozen_logits(part, index) if index < newest else self.logits(part)
            z = z.index_put(place, torch.maximum(z[place], logits))
        return z

    @torch.no_grad()
    def frozen_logits(self, batch: Batch, index: int) -> Tensor:
        """Logits of a frozen module on train rows, each row computed at most once in the whole run."""

        def compute(missing: np.ndarray) -> np.ndarray:
            with self.objective.adapters.using(module_name(index)):
                part = self.data.train.batch(missing, self.objective.device)
                return self.modules[index](self.objective.features(part)).cpu().numpy()

        found = self.cache.get(index, len(self.modules[index].labels), batch.rows, compute)
        return torch.from_numpy(found).to(batch.labels.device)

    @torch.no_grad()
    def select_training(self, batch: Batch) -> Tensor:
        """The selector's choice, computed once per row and task; teacher forcing puts the true task last if missing."""
        missing = np.unique(batch.rows[self.ranking[batch.rows, 0] < 0])
        if len(missing):
            chosen = self.select(self.data.train.batch(missing, self.objective.device))
            self.ranking[missing, : chosen.shape[1]] = chosen.cpu().numpy()
        width = min(self.top_k, len(self.modules))
        selected = torch.from_numpy(self.ranking[batch.rows, :width]).to(batch.tasks.device)
        return force(selected, batch.tasks) if self.teacher_forcing else selected

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Concatenates the raw logits of the selected modules; the selector's scores rank and do not weigh."""
        if not self.modules:
            return Predictions(self.route(batch, torch.zeros_like(batch.tasks)[:, None]))
        selected = self.select(batch)
        trace = {} if self.top_k >= len(self.modules) else {"selected": selected[:, 0]}
        return Predictions(self.route(batch, selected), selected, trace)

    def validate(self, index: int) -> float:
        """K = 1: the new task inside its own module decides; neither the selector nor old tasks change meanwhile."""
        if self.top_k > 1:
            return super().validate(index)
        pool = self.data.validation
        own = [(pool, pool.rows_of(index))]
        choices = Choices(self.benchmark.task_labels(index))

        def right(batch: Batch) -> Tensor:
            found = Predictions(self.route(batch, batch.tasks[:, None]))
            return self.objective.judge(batch, found, choices)

        return self.average_score(own, right)

    def trainable_parameters(self) -> int:
        """Module k and, from task 2 on, the selector."""
        count = super().trainable_parameters()
        if "selector" in self.objective.adapters.names:
            count += self.objective.adapters.count("selector") + sum(p.numel() for p in self.selector.parameters())
        return count

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(p.numel() for p in self.selector.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "selector": self.selector.state(), "cache": self.cache.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.selector.load(state["selector"])
        self.cache.load(state["cache"])

    def heads(self) -> dict[str, Head]:
        return {**super().heads(), "selector": self.selector}


def force(selected: Tensor, tasks: Tensor) -> Tensor:
    """Teacher forcing: where the true task is not selected it replaces the last one; the size stays K."""
    missing = (selected != tasks[:, None]).all(1)
    last = torch.where(missing, tasks, selected[:, -1])
    return torch.cat([selected[:, :-1], last[:, None]], dim=1)


class LogitCache:
    """Logits of frozen modules by (module, row), each computed at most once."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.values: dict[int, np.ndarray] = {}
        self.valid: dict[int, np.ndarray] = {}

    def state(self) -> dict[str, Any]:
        """Valid rows and their logits by module."""
        return {
            str(module): {
                "rows": torch.from_numpy(np.flatnonzero(valid)),
                "logits": torch.from_numpy(self.values[module][valid]),
            }
            for module, valid in self.valid.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for module, found in state.items():
            rows, logits = found["rows"].numpy(), found["logits"].numpy()
            self.values[int(module)] = np.zeros((self.rows, logits.shape[1]), dtype=np.float32)
            self.valid[int(module)] = np.zeros(self.rows, dtype=bool)
            self.values[int(module)][rows] = logits
            self.valid[int(module)][rows] = True

    def get(self, module: int, width: int, rows: np.ndarray, compute: Any) -> np.ndarray:
        """[len(rows), width] fp32; `compute` is called with the distinct rows that are not known yet."""
        if module not in self.values:
            self.values[module] = np.zeros((self.rows, width), dtype=np.float32)
            self.valid[module] = np.zeros(self.rows, dtype=bool)
        missing = np.unique(rows[~self.valid[module][rows]])
        if len(missing):
            self.values[module][missing] = compute(missing)
            self.valid[module][missing] = True
        return self.values[module][rows]
