"""Dynamic ConPET (Song et al., 2023, arXiv 2309.14763, section 3.7): a module per task and a selector of the top K.

From task 2 on, a task is learned in two stages, first the selector and then module k:
    selector  L_sel = cross-entropy of the task number (components/task_selector.py)
    module k  L = cross-entropy over the union of the labels of the K modules selected for an example
Both train on batches that mix new and old examples in a fixed ratio (replay=dynamic), so that the cost of a task does
not depend on the number of earlier tasks. At test the raw logits of the selected modules are concatenated.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.components.logit_cache import LogitCache
from clpet.methods.components.task_selector import Prototypes, Selector
from clpet.methods.modular import Modular, module_name
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import AnswerSpace, Objective, Predictions
from clpet.objectives.classification import MISSING, Head
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan
from clpet.replay.sampled import SampledReplay
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


class Routing(Enum):
    """Ranking of the modules for an input: a trained selector (as in the paper) or class means of frozen features."""

    trained = "trained"
    prototypes = "prototypes"


class WarmStart(Enum):
    """Initial values of module k's adapter: random, module k - 1, or the current selector."""

    scratch = "scratch"
    previous = "previous"
    selector = "selector"


@dataclass
class DynamicConPET(Modular):
    """Modules {LoRA_j, head_j} are frozen after their task; one selector {LoRA_sel, head_sel over tasks}."""

    top_k: int = 1
    teacher_forcing: bool = True
    warm_start: WarmStart = WarmStart.scratch
    selector: Routing = Routing.trained
    selector_clip: float = 1.0
    selector_epochs: int | None = None
    selector_lr: float | None = None
    selector_ratio: float | None = -3.0

    uses_replay: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("router=selector",)

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "method.top_k", self.top_k, "at least 1")
        require(self.selector_clip >= 0, "method.selector_clip", self.selector_clip, "0 (off) or more")
        epochs, lr = self.selector_epochs, self.selector_lr
        require(epochs is None or epochs >= 1, "method.selector_epochs", epochs, "at least 1, or null")
        require(lr is None or lr > 0, "method.selector_lr", lr, "more than 0, or null")
        require(
            self.selector_ratio != 0, "method.selector_ratio", 0, "positive (new:old) or negative (old:new), or null"
        )

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay == "none" and self.selector is Routing.trained:
            raise ConfigError(
                "method=dynamic_conpet trains its selector on old examples: set replay=dynamic or replay=all, "
                "or method.selector=prototypes"
            )

    def ineffective(self) -> dict[str, str]:
        options = ("clip", "epochs", "lr", "ratio") if self.selector is Routing.prototypes else ()
        return {f"method.selector_{option}": "method.selector=prototypes trains nothing" for option in options}

    def check_benchmark(self, benchmark: Benchmark) -> None:
        trained = self.selector is Routing.trained
        if self.warm_start is WarmStart.selector and (self.top_k >= len(benchmark) or not trained):
            raise ConfigError(
                "method.warm_start=selector needs a trained selector: set method.selector=trained and method.top_k "
                "below the number of tasks"
            )

    def tied_to_later_tasks(self, learned: int, before: int, now: int) -> str:
        routed = learned if self.selector is Routing.prototypes else learned - 1  # tasks that a selector learns
        if routed and (self.top_k < before) != (self.top_k < now):
            return f"with method.top_k={self.top_k} it has learned no selector of its {before} tasks"
        if self.top_k > 1 and learned > 1:
            return (
                "with method.top_k above 1 it trains on logits that are rounded together with those of all later labels"
            )
        return ""

    def init_adapters(self) -> None:
        super().init_adapters()
        self.cache = LogitCache(self.objective, self.cache_dir)
        self.router: Selector | Prototypes = (
            Selector(self.objective, self.cache, self.benchmark.names, self.seed)
            if self.selector is Routing.trained
            else Prototypes(self.objective, self.cache)
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
        """Learns to route to task `index`, before its module; a trained selector starts with the second task."""
        if isinstance(self.router, Prototypes):
            rows = self.data.train.rows_of(index)
            with self.objective.adapters.off():
                h = self.embed(rows, self.objective.features)
            self.router.add(h, torch.from_numpy(self.data.train.labels[rows]).to(h.device))
        elif index > 0:
            plan, accuracy = self.selector_plan(index), partial(self.selector_accuracy, index)
            with trainer.using(self.selector_epochs, self.selector_lr):
                self.router.learn(trainer, index, plan, self.selector_clip, accuracy)

    def selector_plan(self, index: int) -> BatchPlan:
        """Batches of the selector stage.

        They have their own ratio, because half a batch of new examples would bias the selector towards the new task.
        """
        replay = self.replay.with_ratio(self.selector_ratio) if isinstance(self.replay, SampledReplay) else self.replay
        return replay.plan(index, "selector")

    def ranking(self, pool: EncodedDataset, rows: np.ndarray) -> np.ndarray:
        """[len(rows), min(K, modules)]: tasks by falling selector score; all modules if there are at most K."""
        modules = len(self.modules)
        if self.top_k >= modules:
            return np.tile(np.arange(modules), (len(rows), 1))
        return self.router.ranking(pool, rows, self.top_k)

    def select(self, batch: Batch) -> Tensor:
        """[batch, min(K, modules)]: the ranking of a batch as a tensor."""
        assert batch.pool is not None
        return torch.from_numpy(self.ranking(batch.pool, batch.rows)).to(batch.labels.device)

    def selector_accuracy(self, index: int) -> float:
        """Fraction of validation examples whose own task is ranked first, averaged over tasks."""
        assert isinstance(self.router, Selector)
        return self.average_score(self.replay.validation(index), self.router.right)

    # Module k: cross-entropy of the selected modules' logits over Y_{1:k}, which are -100 for all other labels.

    def training_set(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), K]: T_i of train rows, the selector's choice; teacher forcing makes it contain the true task."""
        tasks: np.ndarray = self.data.train.tasks[rows]
        if self.top_k == 1:
            return tasks.reshape(-1, 1)
        chosen = self.ranking(self.data.train, rows)
        return force_true_task(chosen, tasks) if self.teacher_forcing else chosen

    def plan(self, index: int) -> BatchPlan:
        """Batches of the module stage. An example without module k in T_i gives no gradient and is not computed.

        With K = 1 these are all old examples.
        """
        return dataclasses.replace(self.replay.plan(index, "module"), gradient_mask=partial(self.selects, index))

    def selects(self, index: int, rows: np.ndarray) -> np.ndarray:
        """[len(rows)]: whether module `index` is in T_i of a row."""
        selected: np.ndarray = (self.training_set(rows) == index).any(1)
        return selected

    def stages(self, index: int) -> dict[str, BatchPlan]:
        trains_selector = index > 0 and self.top_k < len(self.benchmark) and self.selector is Routing.trained
        return {**({"selector": self.selector_plan(index)} if trains_selector else {}), "module": self.plan(index)}

    def fit(self, trainer: Trainer, index: int) -> None:
        """With K > 1 frozen logits are computed in advance, in large blocks; the training loop only looks them up."""
        if self.top_k > 1:
            rows = trainer.rows(self.plan(index))
            self.prefetch_scores(self.data.train, rows)
            rows = rows[self.selects(index, rows)]
            self.prefetch_logits(self.data.train, rows, self.training_set(rows))
        super().fit(trainer, index)
        self.cache.freeze(module_name(index), *self.readout(index))

    def prefetch_scores(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Computes the selector's scores that `ranking` will need, in large blocks."""
        if self.top_k < len(self.modules):
            self.router.prefetch(pool, rows)

    def prefetch_logits(self, pool: EncodedDataset, rows: np.ndarray, chosen: np.ndarray) -> None:
        """Computes missing logits of the frozen modules among `chosen` [len(rows), any number], in large blocks."""
        for index in np.unique(chosen).tolist():
            if module_name(index) in self.cache:
                self.cache.prefetch(module_name(index), pool, rows[(chosen == index).any(1)])

    def loss(self, context: StepContext) -> Tensor:
        """K = 1: cross-entropy over Y_k. K > 1: cross-entropy over the union of the selected modules' labels."""
        batch = context.batch
        if self.top_k == 1 or len(self.modules) == 1:
            return super().loss(context)
        logits = self.union_logits(batch, self.training_set(batch.rows))
        return self.objective.mean_cross_entropy(logits, batch.labels, batch)

    def union_logits(self, batch: Batch, selected: np.ndarray) -> Tensor:
        """[batch, all labels]: logits for train rows that all selected the newest module, the only one with a gradient.

        `selected` [batch, K] are their modules; labels that were not seen yet get minus infinity.
        """
        newest = len(self.modules) - 1
        z = np.full((len(batch), len(self.benchmark.labels)), -np.inf, dtype=np.float32)
        z[:, self.benchmark.seen_labels(newest + 1)] = MISSING
        for index in np.unique(selected[selected < newest]).tolist():
            rows = np.flatnonzero((selected == index).any(1))
            labels = self.modules[index].labels
            cells = np.ix_(rows, labels)
            logits = self.cache.get(module_name(index), self.data.train, batch.rows[rows])
            z[cells] = np.maximum(z[cells], logits[:, : len(labels)])  # a label of two modules gets the larger logit
        fixed = torch.from_numpy(z).to(batch.labels.device, non_blocking=True)
        new = torch.as_tensor(self.modules[newest].labels).to(fixed.device, non_blocking=True)
        return fixed.index_copy(1, new, torch.maximum(fixed[:, new], self.logits(batch)))

    def module_logits(self, batch: Batch, index: int) -> Tensor:
        """Logits of a module; those of frozen modules come from the cache."""
        if module_name(index) not in self.cache:
            return super().module_logits(batch, index)
        assert batch.pool is not None
        return torch.from_numpy(self.cache.get(module_name(index), batch.pool, batch.rows)).to(batch.labels.device)

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Runs the selector on all examples and then each module on the examples it will score, in large blocks."""
        if self.modules:
            self.prefetch_scores(pool, rows)
            chosen, tasks = self.ranking(pool, rows), pool.tasks[rows][:, None]
            # The task-incremental view needs the true task's module, if the task is known and has one yet.
            tasks = np.where((tasks >= 0) & (tasks < len(self.modules)), tasks, chosen[:, :1])
            self.prefetch_logits(pool, rows, np.concatenate([chosen, tasks], axis=1))

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Concatenates the raw logits of the selected modules; the selector's scores are not used as weights."""
        if not self.modules:
            return Predictions(self.route(batch, torch.zeros_like(batch.tasks)[:, None]))
        selected = self.select(batch)
        extras = {} if self.top_k >= len(self.modules) else {"selected": selected[:, 0]}
        return Predictions(self.route(batch, selected), selected, extras)

    def validate(self, index: int) -> float:
        """K = 1: score of the new module on its task; selector and old modules do not change in this stage."""
        if self.top_k > 1:
            return super().validate(index)
        pool = self.data.validation
        validation = [(pool, pool.rows_of(index))]
        choices = AnswerSpace(self.benchmark.task_labels(index))

        def score(batch: Batch) -> Tensor:
            predictions = Predictions(self.route(batch, batch.tasks[:, None]))
            return torch.as_tensor(self.objective.score(batch, predictions, choices)["score"])

        return self.average_score(validation, score)

    def trainable_parameters(self) -> int:
        """Number of scalars in module k and, from task 2 on, in the trained selector."""
        count = super().trainable_parameters()
        selector = self.router.named_parameters().values() if self.router.learned else ()
        return count + sum(p.numel() for p in selector)

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        for index in range(len(self.modules)):
            self.cache.freeze(module_name(index), *self.readout(index))

    def heads(self) -> dict[str, Head]:
        return {**super().heads(), **({"selector": self.router.head} if isinstance(self.router, Selector) else {})}


def force_true_task(selected: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Teacher forcing: the true task replaces the last selected one if it is not among the K selected."""
    missing = (selected != tasks[:, None]).all(1)
    last = np.where(missing, tasks, selected[:, -1])
    return np.concatenate([selected[:, :-1], last[:, None]], axis=1)
