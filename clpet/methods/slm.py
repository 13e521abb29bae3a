"""SLM: an input retrieves the low-rank weight increments it needs by key (Peng et al., ICLR 2024, arXiv 2404.07470).

Stage 1 (DTKR, components/key_retrieval.py) learns a task's keys on cached sentence embeddings, without the backbone.
Stage 2 (JARe) learns a task's values with L = CE: every key owns a value, which is a low-rank increment of every target
layer, stored in factored form,
    h = W u + sum_i w_i(x) A_i B_i u,    w_i = s_i / sum_j s_j over the K keys most similar to x, 0 for all others,
where s are cosines and initially A = 0, B ~ N(0, 1). Keys and values of earlier tasks are never trained again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.features import Embeddings
from clpet.methods.components.key_retrieval import (
    KeyLearning,
    Mixture,
    RetrievalStats,
    cosines,
    majority,
    num_uniform,
    orthonormal,
    retrieve,
)
from clpet.methods.modular import module_name
from clpet.models.peft_options import Lora
from clpet.models.sentence_encoder import Encoder, backbone, locate
from clpet.models.stacked_lora import StackedLora, require_attention_outputs
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.classification import Classification, Head
from clpet.objectives.per_task_heads import TaskHeads
from clpet.records import Figures, Json
from clpet.runtime.distributed import get_world
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)

OPTIONS = {
    "values": ("shared", "per_group"),
    "retrieval": ("instance", "batch_mean"),
    "combine": ("ratio", "mean"),
    "head": ("single", "per_task"),
}


class Sizes(NamedTuple):
    """Groups of an embedding, keys per task and group, and keys retrieved for a text."""

    groups: int
    keys: int
    top_k: int


PUBLISHED = Sizes(6, 4, 4)
MIN_KEYS = 20  # of the sizes chosen for tasks with labels


@dataclass
class SLM(Method):
    """Retrieves among the keys of all tasks with no task id at test (SLM), or among those of the given task (SLM-TI).

    values=per_group: the key of every group owns a value, and K keys are retrieved in every group; shared: a key's
    similarity is averaged over groups, which share its value. head=single: one row per label, rows of earlier tasks
    are frozen. head=per_task: every task has its own rows, and the task id is given at test (SLM-TI).
    """

    encoder: str = "minilm"
    encoder_length: int = 256
    groups: int | None = None
    keys: int | None = None
    top_k: int | None = None
    values: str = "shared"
    retrieval: str = "instance"
    combine: str = "ratio"
    rank: int = 12
    targets: list[str] | None = None
    head: str = "single"
    stage1: KeyLearning = field(default_factory=KeyLearning)

    supports_plain_text: ClassVar[bool] = False
    supported_pefts: ClassVar[tuple[str, ...]] = ("frozen",)
    mergeable: ClassVar[bool] = False
    supports_recompute: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = (
        "key_pool=slm.keys",
        "stack=slm.values",
        "task_heads=slm.rows",
        "stats=slm.tally",
    )

    def __post_init__(self) -> None:
        for option, values in OPTIONS.items():
            require(getattr(self, option) in values, f"method.{option}", getattr(self, option), " or ".join(values))
        for option in ("groups", "keys", "top_k"):
            value = getattr(self, option)
            require(value is None or value >= 1, f"method.{option}", value, "at least 1, or null")
        for option in ("rank", "encoder_length"):
            require(getattr(self, option) >= 1, f"method.{option}", getattr(self, option), "at least 1")
        self.task_id_at_test = self.head == "per_task"

    def check_benchmark(self, benchmark: Benchmark) -> None:
        sizes, dim = self.choose_sizes(benchmark), Encoder(locate(self.encoder), self.encoder_length).dim
        if dim % sizes.groups:
            raise ConfigError(
                f"method.groups={sizes.groups} must be a divisor of {dim}, the embedding size of {self.encoder}"
            )
        if sizes.keys > dim // sizes.groups:
            raise ConfigError(
                f"method.keys={sizes.keys} must be at most {dim // sizes.groups}, the numbers in one of {sizes.groups} "
                "groups: keys are orthogonal"
            )
        allowed = f"from 1 to method.keys={sizes.keys}, the keys of a task"
        require(sizes.top_k <= sizes.keys, "method.top_k", sizes.top_k, allowed)
        require(self.stage1.top_k <= sizes.keys, "method.stage1.top_k", self.stage1.top_k, allowed)

    def choose_sizes(self, benchmark: Benchmark) -> "Sizes":
        """The sizes set in the options; for tasks with labels the defaults depend on the largest number of labels.

        Without labels the defaults are the published ones: 6 groups of 4 keys, 4 retrieved. With labels there are one
        group, two keys per label of the largest task, and one key retrieved per text, so that the texts of a label
        share keys. The published sizes mix values of dissimilar labels: on CLINC150 they retrieve the right task for a
        third of the texts, the defaults with labels for nine tenths.
        """
        labels = max(len(task.labels) for task in benchmark.tasks)
        groups, keys, top_k = PUBLISHED if labels == 0 else Sizes(1, max(MIN_KEYS, 2 * labels), 1)
        return Sizes(self.groups or groups, self.keys or keys, self.top_k or min(top_k, self.keys or keys))

    def resolved(self, benchmark: Benchmark) -> dict[str, Json]:
        sizes = self.choose_sizes(benchmark)._asdict()
        return {f"method.{option}": value for option, value in sizes.items() if getattr(self, option) is None}

    def inputs(self) -> dict[str, str]:
        return {"encoder": backbone(self.encoder).fingerprint(self.cache_dir) or ""}

    def init_adapters(self) -> None:
        """Attaches no value yet: row 0 of the matrix is the bare backbone."""
        objective, self.sizes = self.objective, self.choose_sizes(self.benchmark)
        self.per_task = self.sizes.keys * (self.sizes.groups if self.values == "per_group" else 1)  # values per task
        encoder = Encoder(locate(self.encoder), self.encoder_length, objective.device, self.cache_dir)
        self.embeddings = Embeddings(encoder, self.benchmark, self.data)
        targets = self.targets or require_attention_outputs(objective.adapters.model)
        lora = Lora(r=self.rank, alpha=self.rank, targets=targets)
        config = lora.peft_config(objective.backbone, objective.adapters.model)
        self.stack = StackedLora(objective.adapters, config, self.per_task)
        self.key_pool: list[Tensor] = []  # per task [G, P, h]
        self.task_heads: TaskHeads | None = None
        if objective.traits.has_labels:
            self.task_heads = TaskHeads(cast(Classification, objective), self.task_id_at_test)
        self.stats = RetrievalStats(len(self.benchmark), objective.device)

    # Learning

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.key_pool.append(self.learn_keys(task, index, trainer))
        seed = derive(self.seed, "values", task.name)
        self.stack.add(seed, self.per_task, lambda b, generator: b.normal_(generator=generator))
        if self.task_heads:
            self.task_heads.grow(self.benchmark.task_labels(index), not self.benchmark.per_task_softmax)
        self.fit(trainer, index)

    def learn_keys(self, task: Task, index: int, trainer: Trainer) -> Tensor:
        """Stage 1: the keys [G, P, h] of a task. Its random numbers depend on its name, not on its position."""
        pool, stage = self.data.train, self.stage1
        rows = pool.rows_of(index)
        queries = self.queries(pool, rows)
        keys = orthonormal(self.sizes.groups, self.sizes.keys, queries.shape[2], derive(self.seed, "keys", task.name))
        seed = derive(self.seed, "key learning", task.name)
        trainer.progress.fit("keys", *stage.length(len(rows)))
        keys = stage.learn(queries, keys.to(queries.device), seed, trainer.progress.step, trainer.dry_run)
        uniform = num_uniform(cosines(queries, keys), self.sizes.top_k, self.values == "per_group")
        if uniform and not trainer.dry_run:
            text = "task %s: %d of %d texts are similar to none of its keys; their values get equal weights"
            log.warning(text, task.name, uniform, len(rows))
        return keys

    def loss(self, context: StepContext) -> Tensor:
        """Stage 2: L = CE with the values of the current task only, weighted by its own keys."""
        batch = context.batch
        mixture = self.retrieve(self.similarities(batch, self.key_pool[-1:]))
        with self.stack.selected_branches(mixture.branches(self.sizes.keys)):
            if self.task_heads is None:
                return self.objective.loss(batch)
            return self.task_heads.loss(self.task_heads.objective.features(batch), batch)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The values and head rows of the current task."""
        return {**self.stack.current(), **(self.task_heads.named_parameters() if self.task_heads else {})}

    # Retrieval

    def queries(self, pool: EncodedDataset, rows: np.ndarray) -> Tensor:
        """[len(rows), G, h]: sentence embeddings cut into chunks."""
        embeddings = self.embeddings(pool, rows).to(self.objective.device, non_blocking=True)
        queries: Tensor = embeddings.unflatten(1, (self.sizes.groups, -1))
        return queries

    def similarities(self, batch: Batch, keys: list[Tensor]) -> Tensor:
        """[batch, G, N]: cosines with the keys of some tasks, computed task by task.

        One product with all keys could round those of a task differently as later tasks are added.
        """
        assert batch.pool is not None
        queries = self.queries(batch.pool, batch.rows)
        return torch.cat([cosines(queries, task_keys) for task_keys in keys], dim=2)

    def retrieve(self, sigma: Tensor, allowed: Tensor | None = None) -> Mixture:
        """Retrieves keys by similarity sigma [batch, G, N] as configured; see `retrieve` in key_retrieval."""
        per_group, uniform, batch_mean = (
            self.values == "per_group",
            self.combine == "mean",
            self.retrieval == "batch_mean",
        )
        return retrieve(sigma, self.sizes.top_k, per_group, uniform, batch_mean, allowed)

    def predict_retrieved(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Predictions with the values of the most similar keys, only of an example's own task if tasks are given."""
        owner = torch.arange(len(self.key_pool), device=batch.tasks.device).repeat_interleave(self.sizes.keys)
        allowed = None if choices.tasks is None else owner == choices.tasks[:, None]
        mixture = self.retrieve(self.similarities(batch, self.key_pool), allowed)
        weights, owners = mixture.branches(self.sizes.keys), mixture.owners(self.sizes.keys)
        used = (weights != 0).any(0).nonzero().squeeze(1)
        with self.stack.selected_branches(weights[:, used], used):
            if self.task_heads is None:
                predictions = self.objective.predict(batch, choices)
            else:
                h = self.task_heads.objective.features(batch)
                predictions = Predictions(self.task_heads.scores(h, choices.tasks))
        predictions.extras["selected"] = majority(owners, len(self.key_pool))
        predictions.extras["right_picks"] = (owners == batch.tasks[:, None]).float().mean(1)
        return predictions

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        if not self.key_pool:
            return super().predict(batch, choices)
        predictions = self.predict_retrieved(batch, choices)
        if self.objective.meter.kind == "evaluated":
            self.stats.add(batch.tasks, predictions.extras["selected"], predictions.extras["right_picks"])
        return predictions

    def predict_known_task(self, batch: Batch, predictions: Predictions) -> Predictions:
        """The view of SLM-TI: examples that retrieved a key of another task run again with the keys of their own."""
        if not self.key_pool or self.task_id_at_test:
            return predictions
        wrong_keys = predictions.extras["right_picks"] < 1
        rows = (wrong_keys & (batch.tasks < len(self.key_pool))).nonzero().squeeze(1)
        if not len(rows):
            return predictions
        subset = batch if len(rows) == len(batch) else batch.select(rows)
        corrected = self.predict_retrieved(subset, AnswerSpace([], subset.tasks))
        if corrected.texts is None:
            assert predictions.scores is not None
            assert corrected.scores is not None
            return Predictions(predictions.scores.index_copy(0, rows, corrected.scores))
        texts = dict(enumerate(predictions.texts or [])) | dict(zip(rows.tolist(), corrected.texts, strict=True))
        return Predictions(texts=list(texts.values()))

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Batches for prediction; with retrieval=batch_mean (one mixture per batch) each has a single task."""
        if self.retrieval == "instance":
            return super().batches(pool, rows)
        tasks = [rows[pool.tasks[rows] == task] for task in np.unique(pool.tasks[rows])]
        return [batch_rows for task_rows in tasks for batch_rows in super(SLM, self).batches(pool, task_rows)]

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        self.stats = RetrievalStats(len(self.benchmark), self.objective.device)

    def after_evaluation(self) -> None:
        if not get_world().sharded:
            get_world().sum([self.stats.votes, self.stats.right])

    # Records

    def diagnostics(self) -> dict[str, float]:
        evaluated = bool(self.stats.votes.sum() > 0)
        names = self.benchmark.names[: len(self.key_pool)]
        return self.stats.figures(names) if evaluated and names else {}

    def figures(self) -> Figures:
        shares = self.stats.votes / self.stats.votes.sum(1, keepdim=True)
        return {"retrieval": {"shares": shares.cpu().numpy(), "tasks": self.benchmark.names}}

    def trainable_parameters(self) -> int:
        return super().trainable_parameters() + sum(keys.numel() for keys in self.key_pool[-1:])

    def save(self, folder: Path) -> None:
        """Writes each value as a separate LoRA; using them takes the keys as well."""
        names = [f"{module_name(task)}.{value}" for task in range(len(self.key_pool)) for value in range(self.per_task)]
        self.stack.save(folder, names)

    def heads(self) -> dict[str, Head]:
        heads = self.task_heads.heads if self.task_heads else []
        return {module_name(index): head for index, head in enumerate(heads) if head.labels}
