"""SLM: keys find the low-rank increments that an input needs (Peng et al., ICLR 2024, arXiv 2404.07470).

DTKR (components/key_retrieval.py): stage 1 learns a task's keys on cached sentence embeddings, without the backbone.
JARe: every key owns a value, a low-rank increment on every target layer; stage 2 learns a task's values,
    h = W u + sum_i w_i(x) A_i B_i u,    w_i = s_i / sum_j s_j over the K keys most similar to x, 0 elsewhere,
A = 0, B ~ N(0, 1) at the start, in factored form. Nothing of an earlier task is ever trained again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError
from clpet.methods.base import Choices, Method, Predictions
from clpet.methods.components.features import Embeddings
from clpet.methods.components.key_retrieval import (
    KeyLearning,
    Mixture,
    RetrievalStats,
    cosines,
    majority,
    orthonormal,
    retrieve,
    unrelated,
)
from clpet.methods.modular import module_name
from clpet.models.adapters import Lora
from clpet.models.sentence_encoder import Encoder, backbone, locate
from clpet.models.stacked_lora import Increments, attention_outputs
from clpet.objectives.classification import Head
from clpet.objectives.per_task_heads import TaskHeads
from clpet.runtime.distributed import get_world
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)

KNOWN = {
    "values": ("shared", "per_group"),
    "retrieval": ("instance", "batch_mean"),
    "combine": ("ratio", "mean"),
    "head": ("single", "per_task"),
}


class Sizes(NamedTuple):
    """Groups of an embedding, a task's keys in each, and the keys whose values are mixed for a text."""

    groups: int
    keys: int
    top_k: int


PUBLISHED = Sizes(6, 4, 4)
FEWEST_KEYS = 20


@dataclass
class SLM(Method):
    """`values=per_group`: every group's key owns a value, and K keys are chosen in every group.

    head=single: one row per label, those of earlier tasks frozen. head=per_task: each task has all of its rows and
    the task id is given at test, where only its own keys may be chosen (SLM-TI).
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

    objectives: ClassVar[tuple[str, ...]] = ("classification", "text_to_text")
    supported_pefts: ClassVar[tuple[str, ...]] = ("frozen",)
    mergeable: ClassVar[bool] = False
    supports_recompute: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for knob, known in KNOWN.items():
            require(getattr(self, knob) in known, f"method.{knob}", getattr(self, knob), " or ".join(known))
        for knob in ("groups", "keys", "top_k"):
            value = getattr(self, knob)
            require(value is None or value >= 1, f"method.{knob}", value, "at least 1, or null")
        for knob in ("rank", "encoder_length"):
            require(getattr(self, knob) >= 1, f"method.{knob}", getattr(self, knob), "at least 1")
        self.task_id_at_test = self.head == "per_task"

    def check_benchmark(self, benchmark: Benchmark) -> None:
        sizes, dim = self.choose_sizes(benchmark), Encoder(locate(self.encoder), self.encoder_length).dim
        if dim % sizes.groups:
            raise ConfigError(f"method.groups={sizes.groups} does not divide the {dim} dimensions of {self.encoder}")
        if sizes.keys > dim // sizes.groups:
            raise ConfigError(
                f"method.keys={sizes.keys}, but a chunk of {dim // sizes.groups} numbers has no more orthogonal keys"
            )
        there = f"from 1 to the {sizes.keys} keys of a task (method.keys)"
        require(sizes.top_k <= sizes.keys, "method.top_k", sizes.top_k, there)
        require(self.stage1.top_k <= sizes.keys, "method.stage1.top_k", self.stage1.top_k, there)

    def choose_sizes(self, benchmark: Benchmark) -> "Sizes":
        """What the options set, else one group, two keys for every label of the largest task, one chosen for a text.

        The texts of a label then share keys. The published 6 groups of 4 keys, 4 chosen, stay where there are no
        labels: they mix labels that lie apart, and find the right task for a third of CLINC150's texts instead of
        nine tenths.
        """
        labels = max(len(task.labels) for task in benchmark.tasks)
        groups, keys, top_k = PUBLISHED if labels == 0 else Sizes(1, max(FEWEST_KEYS, 2 * labels), 1)
        return Sizes(self.groups or groups, self.keys or keys, self.top_k or min(top_k, self.keys or keys))

    def resolved(self, benchmark: Benchmark) -> dict[str, Any]:
        sizes = self.choose_sizes(benchmark)._asdict()
        return {f"method.{knob}": value for knob, value in sizes.items() if getattr(self, knob) is None}

    def inputs(self) -> dict[str, str]:
        return {"encoder": backbone(self.encoder).fingerprint(self.cache_dir) or ""}

    def init_adapters(self) -> None:
        """Row 0 is the bare backbone."""
        objective, self.sizes = self.objective, self.choose_sizes(self.benchmark)
        self.per_task = self.sizes.keys * (self.sizes.groups if self.values == "per_group" else 1)  # values of a task
        encoder = Encoder(locate(self.encoder), self.encoder_length, objective.device, self.cache_dir)
        self.embeddings = Embeddings(encoder, self.benchmark, self.data)
        lora = Lora(r=self.rank, alpha=self.rank, targets=self.targets or attention_outputs(objective.adapters.model))
        self.increments = Increments(objective.adapters, lora.peft_config(objective.backbone))
        self.key_pool: list[Tensor] = []  # of every task [G, P, h]
        self.rows = None if objective.generates else TaskHeads(objective, self.task_id_at_test)
        self.stats = RetrievalStats(len(self.benchmark), objective.device)

    # Learning

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.key_pool.append(self.learn_keys(task, index, trainer))
        seed = derive(self.seed, "values", task.name)
        self.increments.add(seed, self.per_task, lambda b, generator: b.normal_(generator=generator))
        if self.rows:
            self.rows.grow(self.benchmark.task_labels(index), not self.benchmark.per_task_softmax)
        self.fit(trainer, index)

    def learn_keys(self, task: Task, index: int, trainer: Trainer) -> Tensor:
        """Stage 1: [G, P, h]. A task's keys and values start from its name, whatever its place in the order."""
        pool, stage = self.data.train, self.stage1
        rows = pool.rows_of(index)
        queries = self.queries(pool, rows)
        keys = orthonormal(self.sizes.groups, self.sizes.keys, queries.shape[2], derive(self.seed, "keys", task.name))
        seed = derive(self.seed, "key learning", task.name)
        trainer.progress.fit("keys", *stage.length(len(rows)))
        keys = stage.learn(queries, keys.to(queries.device), seed, trainer.progress.step, trainer.dry_run)
        lost = unrelated(cosines(queries, keys), self.sizes.top_k, self.values == "per_group")
        if lost and not trainer.dry_run:
            log.warning(
                "task %s: %d of %d texts are unlike the keys; theirs are mixed evenly", task.name, lost, len(rows)
            )
        return keys

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss with its own values, mixed by its own keys."""
        mixture = self.mix(self.similarities(batch, self.key_pool[-1:]))
        with self.increments.mixed(mixture.branches(self.sizes.keys)):
            if self.rows is None:
                return self.objective.loss(batch)
            return self.rows.loss(self.objective.features(batch), batch.labels)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the current task: its values and head rows."""
        return {**self.increments.current(), **(self.rows.named_parameters() if self.rows else {})}

    # Retrieval

    def queries(self, pool: EncodedDataset, rows: np.ndarray) -> Tensor:
        """[len(rows), G, h]: the embeddings in chunks."""
        found = self.embeddings(pool, rows).to(self.objective.device, non_blocking=True)
        return found.unflatten(1, (self.sizes.groups, -1))

    def similarities(self, batch: Batch, keys: list[Tensor]) -> Tensor:
        """[batch, G, N]: cosines with the keys of some tasks; one task's do not depend on what others there are."""
        assert batch.pool is not None
        queries = self.queries(batch.pool, batch.rows)
        return torch.cat([cosines(queries, own) for own in keys], dim=2)

    def mix(self, sigma: Tensor, allowed: Tensor | None = None) -> Mixture:
        """What the knobs make of similarities."""
        per_group, uniform, batch_mean = (
            self.values == "per_group",
            self.combine == "mean",
            self.retrieval == "batch_mean",
        )
        return retrieve(sigma, self.sizes.top_k, per_group, uniform, batch_mean, allowed)

    def answer(self, batch: Batch, choices: Choices) -> Predictions:
        """Predictions with the values of the most similar keys, its own task's only where an example's is given."""
        owner = torch.arange(len(self.key_pool), device=batch.tasks.device).repeat_interleave(self.sizes.keys)
        allowed = None if choices.tasks is None else owner == choices.tasks[:, None]
        mixture = self.mix(self.similarities(batch, self.key_pool), allowed)
        weights, owners = mixture.branches(self.sizes.keys), mixture.owners(self.sizes.keys)
        used = (weights != 0).any(0).nonzero().squeeze(1)
        with self.increments.mixed(weights[:, used], used):
            if self.rows is None:
                found = self.objective.predict(batch, choices)
            else:
                found = Predictions(self.rows.scores(self.objective.features(batch), choices.tasks))
        found.trace["selected"] = majority(owners, len(self.key_pool))
        found.trace["right_picks"] = (owners == batch.tasks[:, None]).float().mean(1)
        return found

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        if not self.key_pool:
            return super().predict(batch, choices)
        found = self.answer(batch, choices)
        if self.objective.meter.kind == "evaluated":
            self.stats.add(batch.tasks, found.trace["selected"], found.trace["right_picks"])
        return found

    def predict_known_task(self, batch: Batch, found: Predictions) -> Predictions:
        """SLM-TI's view: an example that picked a key of another task is answered again with those of its own."""
        if not self.key_pool or self.task_id_at_test:
            return found
        lost = ((found.trace["right_picks"] < 1) & (batch.tasks < len(self.key_pool))).nonzero().squeeze(1)
        if not len(lost):
            return found
        part = batch if len(lost) == len(batch) else batch.select(lost)
        again = self.answer(part, Choices([], part.tasks))
        if again.texts is None:
            return Predictions(found.scores.index_copy(0, lost, again.scores))  # type: ignore[union-attr, arg-type]
        texts = dict(enumerate(found.texts or [])) | dict(zip(lost.tolist(), again.texts, strict=True))
        return Predictions(texts=list(texts.values()))

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """retrieval=batch_mean takes a batch for one task's."""
        if self.retrieval == "instance":
            return super().batches(pool, rows)
        tasks = [rows[pool.tasks[rows] == task] for task in np.unique(pool.tasks[rows])]
        return [part for own in tasks for part in super(SLM, self).batches(pool, own)]

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        self.stats = RetrievalStats(len(self.benchmark), self.objective.device)

    def after_evaluation(self) -> None:
        if not get_world().sharded:
            get_world().sum([self.stats.votes, self.stats.right])

    # Records

    def diagnostics(self) -> dict[str, float]:
        measured = self.stats.votes.sum(1).nonzero().squeeze(1).tolist()
        names = self.benchmark.names[: len(self.key_pool)]
        return self.stats.figures(names) if measured and names else {}

    def figures(self) -> dict[str, dict[str, Any]]:
        shares = self.stats.votes / self.stats.votes.sum(1, keepdim=True)
        return {"retrieval": {"shares": shares.cpu().numpy(), "tasks": self.benchmark.names}}

    def trainable_parameters(self) -> int:
        return super().trainable_parameters() + sum(keys.numel() for keys in self.key_pool[-1:])

    def stored_parameters(self) -> int:
        rows = self.rows.count() if self.rows else 0
        return super().stored_parameters() + self.increments.count() + rows + sum(k.numel() for k in self.key_pool)

    def save(self, folder: Path) -> None:
        """Each value as a LoRA of its own; the keys say how they are mixed."""
        names = [f"{module_name(task)}.{value}" for task in range(len(self.key_pool)) for value in range(self.per_task)]
        self.increments.save(folder, names)

    def state_dict(self) -> dict[str, Any]:
        own = {
            "keys": self.key_pool,
            "values": self.increments.state(),
            "rows": self.rows.state() if self.rows else [],
            "tally": self.stats.state(),
        }
        return {**super().state_dict(), "slm": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own, device = state["slm"], self.objective.device
        self.key_pool = [keys.to(device) for keys in own["keys"]]
        self.increments.load(own["values"], self.per_task)
        self.stats.load(own["tally"])
        if self.rows:
            self.rows.load(own["rows"])

    def heads(self) -> dict[str, Head]:
        rows = self.rows.heads if self.rows else []
        return {module_name(index): head for index, head in enumerate(rows) if head.labels}
