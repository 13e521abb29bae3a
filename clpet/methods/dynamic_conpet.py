"""Dynamic ConPET (Song et al., 2023, arXiv 2309.14763): a module per task and a selector that routes to the top K.

Per task k >= 2: first the selector, then module k. Both train on dynamic batches, half new and half old, so
the cost of a task does not depend on how many came before. Notation of ConPET's section 3.7.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.base import Choices, Predictions
from clpet.methods.components.logit_cache import LogitCache
from clpet.methods.components.task_selector import Prototypes, Selector
from clpet.methods.modular import Modular, module_name
from clpet.objectives.classification import MISSING, Head
from clpet.replay.batch_plan import BatchPlan
from clpet.replay.sampled import SampledReplay
from clpet.training.trainer import Trainer


class Routing(Enum):
    """What ranks the modules for an input: a trained selector (the paper's), or class means of frozen features."""

    trained = "trained"
    prototypes = "prototypes"


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
    selector: Routing = Routing.trained
    selector_clip: float = 1.0
    selector_epochs: int | None = None
    selector_lr: float | None = None
    selector_ratio: float | None = -3.0

    uses_replay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "method.top_k", self.top_k, "at least 1")
        require(self.selector_clip >= 0, "method.selector_clip", self.selector_clip, "0 (off) or more")
        epochs, lr = self.selector_epochs, self.selector_lr
        require(epochs is None or epochs >= 1, "method.selector_epochs", epochs, "at least 1, or null")
        require(lr is None or lr > 0, "method.selector_lr", lr, "more than 0, or null")
        require(
            self.selector_ratio != 0, "method.selector_ratio", 0, "positive (new:old) or negative (old:new), or null"
        )

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if replay == "none" and self.selector is Routing.trained:
            raise ConfigError(
                "method=dynamic_conpet trains its selector on old examples: take replay=dynamic or replay=all, "
                "or method.selector=prototypes"
            )

    def check_benchmark(self, benchmark: Benchmark) -> None:
        trained = self.selector is Routing.trained
        if self.warm_start is WarmStart.selector and (self.top_k >= len(benchmark) or not trained):
            raise ConfigError("method.warm_start=selector, but no selector is trained here")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.store = LogitCache(self.objective, self.cache_dir)
        self.router: Selector | Prototypes = (
            Selector(self.objective, self.store, self.benchmark.names, self.seed)
            if self.selector is Routing.trained
            else Prototypes(self.objective, self.store)
        )

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if self.top_k < len(self.benchmark):
            self.learn_routing(index, trainer)
        self.add_module(index)
        if index > 0 and self.warm_start is not WarmStart.scratch:
            source = module_name(index - 1) if self.warm_start is WarmStart.previous else "selector"
            self.objective.adapters.copy(source, module_name(index))
        self.fit(trainer, index)

    def learn_routing(self, index: int, trainer: Trainer) -> None:
        """The routing of a task is learned before its module; a trained selector needs two tasks to tell apart."""
        if isinstance(self.router, Prototypes):
            rows = self.data.train.rows_of(index)
            with self.objective.adapters.off():
                h = self.embed(rows, self.objective.features)
            self.router.add(h, torch.from_numpy(self.data.train.labels[rows]).to(h.device))
        elif index > 0:
            plan, right = self.selector_plan(index), partial(self.selector_accuracy, index)
            with trainer.using(self.selector_epochs, self.selector_lr):
                self.router.learn(trainer, index, plan, self.selector_clip, right)

    def selector_plan(self, index: int) -> BatchPlan:
        """Batches of the selector stage: with half of a batch from the newest task it prefers that task at test."""
        replay = self.replay.with_ratio(self.selector_ratio) if isinstance(self.replay, SampledReplay) else self.replay
        return replay.plan(index, "selector")

    def ranking(self, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """[len(rows), min(K, modules)]: task numbers by falling selector score; all modules when K covers them."""
        modules = len(self.modules)
        if self.top_k >= modules:
            return np.tile(np.arange(modules), (len(rows), 1))
        return self.router.ranking(pool, rows, self.top_k)

    def select(self, batch: Batch) -> Tensor:
        """[batch, min(K, modules)]: the ranking of a batch."""
        assert batch.pool is not None
        return torch.from_numpy(self.ranking(batch.pool, batch.rows)).to(batch.labels.device)

    def selector_accuracy(self, index: int) -> float:
        """Average over tasks of the share of validation examples sent to their own task."""
        assert isinstance(self.router, Selector)
        return self.average_score(self.replay.validation(index), self.router.right)

    # Module k: logits of the selected modules over Y_{1:k}, -100 elsewhere; cross-entropy.

    def training_set(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), K] T_i of train rows: the selector's choice, with teacher forcing the true task always in it."""
        tasks = self.data.train.tasks[rows]
        if self.top_k == 1:
            return tasks[:, None]
        chosen = self.ranking(self.data.train, rows)
        return force(chosen, tasks) if self.teacher_forcing else chosen

    def plan(self, index: int) -> BatchPlan:
        """An example whose T_i holds only frozen modules gives no gradient: it is not computed at all.

        With K = 1 these are all old examples.
        """
        return dataclasses.replace(self.replay.plan(index, "module"), gradient_mask=partial(self.meets, index))

    def meets(self, index: int, rows: np.ndarray) -> np.ndarray:
        """[len(rows)]: whether module `index` is in T_i."""
        return (self.training_set(rows) == index).any(1)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        selects = index > 0 and self.top_k < len(self.benchmark) and self.selector is Routing.trained
        return {**({"selector": self.selector_plan(index)} if selects else {}), "module": self.plan(index)}

    def fit(self, trainer: Trainer, index: int) -> None:
        """With K > 1 frozen logits come first, in large blocks: the inner loop only looks them up."""
        if self.top_k > 1:
            rows = trainer.rows(self.plan(index))
            self.look_up_selector(self.data.train, rows)
            rows = rows[self.meets(index, rows)]
            self.look_up(self.data.train, rows, self.training_set(rows))
        super().fit(trainer, index)
        self.store.freeze(module_name(index), *self.readout(index))

    def look_up_selector(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Has the selector's scores computed where `ranking` will ask for them."""
        if self.top_k < len(self.modules):
            self.router.look_up(pool, rows)

    def look_up(self, pool: EncodedDataset, rows: np.ndarray, chosen: np.ndarray) -> None:
        """Has the logits of the frozen modules among `chosen` [len(rows), any] computed where they are not known."""
        for index in np.unique(chosen).tolist():
            if module_name(index) in self.store:
                self.store.prefetch(module_name(index), pool, rows[(chosen == index).any(1)])

    def loss(self, batch: Batch) -> Tensor:
        """K = 1: plain cross-entropy inside Y_k. K > 1: cross-entropy over the union of the selected modules."""
        if self.top_k == 1 or len(self.modules) == 1:
            return super().loss(batch)
        return F.cross_entropy(self.union_logits(batch, self.training_set(batch.rows)), batch.labels)

    def union_logits(self, batch: Batch, selected: np.ndarray) -> Tensor:
        """[batch, all labels] for train rows that all selected the newest module, the only one with a gradient.

        Labels not seen yet are at minus infinity.
        """
        newest = len(self.modules) - 1
        z = np.full((len(batch), len(self.benchmark.labels)), -np.inf, dtype=np.float32)
        z[:, self.benchmark.seen_labels(newest + 1)] = MISSING
        for index in np.unique(selected[selected < newest]).tolist():
            keep = np.flatnonzero((selected == index).any(1))
            labels = self.modules[index].labels
            place = np.ix_(keep, labels)
            logits = self.store.get(module_name(index), self.data.train, batch.rows[keep])
            z[place] = np.maximum(z[place], logits[:, : len(labels)])
        fixed = torch.from_numpy(z).to(batch.labels.device, non_blocking=True)
        own = torch.as_tensor(self.modules[newest].labels).to(fixed.device, non_blocking=True)
        return fixed.index_copy(1, own, torch.maximum(fixed[:, own], self.logits(batch)))

    def answers(self, batch: Batch, index: int) -> Tensor:
        """What a frozen module answers is looked up."""
        if module_name(index) not in self.store:
            return super().answers(batch, index)
        assert batch.pool is not None
        return torch.from_numpy(self.store.get(module_name(index), batch.pool, batch.rows)).to(batch.labels.device)

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """First all examples to the selector, then to each module those that it will be asked for, in large blocks."""
        if self.modules:
            self.look_up_selector(pool, rows)
            chosen, own = self.ranking(pool, rows), pool.tasks[rows][:, None]
            own = np.where(own < len(self.modules), own, chosen[:, :1])
            self.look_up(pool, rows, np.concatenate([chosen, own], axis=1))

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
        """Module k and, from task 2 on, the trained selector."""
        count = super().trainable_parameters()
        own = self.router.named_parameters().values() if self.router.learned else ()
        return count + sum(p.numel() for p in own)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + self.router.stored()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "selector": self.router.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for index in range(len(self.modules)):
            self.store.freeze(module_name(index), *self.readout(index))
        self.router.load(state["selector"])

    def heads(self) -> dict[str, Head]:
        return {**super().heads(), **({"selector": self.router.head} if isinstance(self.router, Selector) else {})}


def force(selected: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Teacher forcing: where the true task is not selected it replaces the last one; the size stays K."""
    missing = (selected != tasks[:, None]).all(1)
    last = np.where(missing, tasks, selected[:, -1])
    return np.concatenate([selected[:, :-1], last[:, None]], axis=1)
