"""CRL: contrastive learning over a bank of representations, with distillation of class relations.

The baseline of ConPET and, with replay=dynamic, its starred version (Song et al., 2023, arXiv 2309.14763, section 3.5).
h are the features of the backbone, z = normalise(W2 relu(W1 h + b1) + b2), s_ia = z_i . z_a / tau. A task is learned in
two stages; formulas of both losses are in components/contrastive.py:
    stage 1  new data           L = L_CL(z, bank)
    stage 2  memory or draws    L = L_CL(z, bank) + L_KD(relations of old classes), from task 2 on
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.contrastive import Bank, contrastive, draw, relation_distillation
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import AnswerSpace, Objective, Predictions
from clpet.objectives.classification import Classification
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan, split_batch
from clpet.replay.exemplar import FixedReplay
from clpet.replay.exemplar_selection import random_features
from clpet.replay.sampled import SampledReplay
from clpet.runtime.distributed import get_world
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer


@dataclass
class CRL(Method[Classification]):
    """Predicts the class whose mean of h is nearest; there is no linear head."""

    tau: float = 0.1
    temperature: float = 10.0
    dim: int = 64
    sample: int = 500
    min_per_class: int = 10
    eps: float = 1e-4
    clip: float = 10.0

    needs_labels: ClassVar[bool] = True
    has_cross_entropy: ClassVar[bool] = False
    uses_replay: ClassVar[bool] = True
    uses_validation: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = ("projection=crl.projection",)
    saved_uncounted: ClassVar[tuple[str, ...]] = ("prototypes=crl.prototypes", "labels=crl.known")
    saved_in_task: ClassVar[tuple[str, ...]] = ("bank.z=z", "bank.sums=sums", "rng")

    def __post_init__(self) -> None:
        require(self.tau > 0, "method.tau", self.tau, "more than 0")
        require(self.dim >= 1, "method.dim", self.dim, "at least 1")
        require(self.sample >= 1, "method.sample", self.sample, "at least 1")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay not in ("fixed", "dynamic", "all"):
            raise ConfigError(f"method=crl needs replay=fixed, dynamic or all, not {replay}")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.replay.cluster_seed = 0
        width, device = self.objective.dim, self.objective.device
        torch.manual_seed(derive(self.seed, "projection"))
        layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim)
        self.projection = nn.Sequential(*layers).to(device)
        self.prototypes = torch.zeros(len(self.benchmark.labels), width, device=device)
        self.labels: list[int] = []  # labels that have a prototype, sorted

    def project(self, h: Tensor) -> Tensor:
        """z of h: [batch, dim of h] -> [batch, dim of z], rows of norm 1."""
        return F.normalize(self.projection(h), dim=1)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.old = list(self.labels)
        self.fit_stage(trainer, index, "contrast", self.new_data_plan(index))
        if index > 0:
            if not self.starred:
                self.replay.update_memory(index, self.vectors)
            self.fit_stage(trainer, index, "replay", self.replay_plan(index, trainer.epochs))

    @property
    def starred(self) -> bool:
        """CRL*: old examples are drawn from all earlier tasks instead of a memory selected per class."""
        return not isinstance(self.replay, FixedReplay)

    def fit_stage(self, trainer: Trainer, index: int, name: str, plan: BatchPlan) -> None:
        """Fits one stage with a new bank, which has an entry for every row that the plan draws."""
        self.drawn = rows = trainer.rows(plan)
        z = self.embed(rows, lambda batch: self.project(self.objective.features(batch)))
        self.bank = Bank(z, self.data.train.labels[rows], rows, len(self.data.train), len(self.benchmark.labels))
        self.old_labels = torch.tensor(self.old, device=z.device)
        self.distil = name == "replay" and bool(self.old)
        self.sampled = name == "contrast" or self.starred
        self.rng = np.random.default_rng(derive(self.seed, "bank", index, name))
        self.computed: list[tuple[np.ndarray, Tensor]] = []  # (rows, z) of the micro-batches of a step
        hooks = dataclasses.replace(self.hooks(index), validate=None)
        trainer.fit(plan, self.named_parameters(), hooks, stage=name, clip=self.clip)

    def new_data_plan(self, index: int) -> BatchPlan:
        """Batches of stage 1: all examples of the new task."""
        return self.shuffled(self.data.train.rows_of(index), index, "contrast")

    def replay_plan(self, index: int, epochs: int) -> BatchPlan:
        """Batches of stage 2: the memory (replay=fixed), or examples drawn in advance for a single pass (CRL*)."""
        pool = self.data.train
        if isinstance(self.replay, FixedReplay):
            rows = np.concatenate([*self.replay.memory.values(), *self.replay.val_memory.values()])
            return self.shuffled(rows, index, "replay")
        if not isinstance(self.replay, SampledReplay):
            return self.replay.plan(index, "replay")
        steps = self.replay.limit or self.replay.plan(index).steps
        rng = self.replay.rng(index, "crl")
        n_new, n_old = split_batch(self.replay.batch_size, self.replay.ratio)
        old_tasks = [self.replay.memory[task] for task in sorted(self.replay.memory)]
        old = draw(pool.labels, old_tasks, n_old * steps * epochs, self.min_per_class, rng)
        new = draw(pool.labels, [pool.rows_of(index)], n_new * steps * epochs, self.min_per_class, rng)
        batches = [
            np.concatenate([new[i * n_new : (i + 1) * n_new], old[i * n_old : (i + 1) * n_old]])
            for i in range(steps * epochs)
        ]
        return BatchPlan(pool, steps, lambda epoch: batches[epoch * steps : (epoch + 1) * steps])

    def shuffled(self, rows: np.ndarray, index: int, stage: str) -> BatchPlan:
        """Epochs over `rows` in a new random order each time."""
        size = self.replay.batch_size
        rng = self.replay.rng
        return BatchPlan(
            self.data.train,
            -(-len(rows) // size),
            lambda epoch: self.data.train.shuffled(rows, size, rng(index, stage, epoch)),
        )

    def stages(self, index: int) -> dict[str, BatchPlan]:
        plans = {"contrast": self.new_data_plan(index)}
        if index > 0:
            if not self.starred:
                self.replay.update_memory(index, random_features)  # the number of steps does not depend on features
            plans["replay"] = self.replay_plan(index, epochs=1)
        return plans

    def before_step(self, context: StepContext) -> None:
        """Samples the bank entries that a step compares with, and the fraction of the batch that is of old classes.

        They depend on the rows of the full batch, so that all micro-batches and ranks use the same values.
        """
        labels = self.data.train.labels[context.rows]
        self.entries = self.bank.sample(labels, self.sample, self.rng) if self.sampled else slice(None)
        self.old_fraction = float(np.isin(labels, self.old).mean())

    def loss(self, context: StepContext) -> Tensor:
        """L_CL, a mean over the batch, plus in stage 2 L_KD, a mean over the examples of old classes."""
        batch = context.batch
        z, entries = self.project(self.objective.features(batch)), self.entries
        if context.counts:
            self.computed.append((batch.rows, z.detach()))
        loss = contrastive(z, batch.labels, self.bank.z[entries], self.bank.labels[entries], self.tau, self.eps)
        if self.distil and self.old_fraction:
            old = self.old_labels
            is_old = torch.isin(batch.labels, old)
            # Row of the label among the old ones; for new labels any valid row will do, they are masked out below.
            class_index = torch.searchsorted(old, batch.labels).clamp(max=len(old) - 1)
            means, prototypes = self.bank.means()[old], self.prototypes[old]
            kl = relation_distillation(z, class_index, prototypes, means, self.temperature)
            # Dividing by the fraction in the full batch makes micro-batches add up to the mean over old examples.
            loss = loss + (kl * is_old).mean() / self.old_fraction
        return loss

    def adjust_gradients(self, context: StepContext) -> None:
        """Collects the representations of a step from all ranks; if the step is skipped they are discarded."""
        gathered = get_world().gather(self.computed)
        self.new_entries, self.computed = [entry for entries in gathered for entry in entries], []

    def after_step(self, context: StepContext) -> None:
        """Replaces the bank entries of the step's examples by their new representations."""
        for rows, z in self.new_entries:
            self.bank.update(rows, z.to(self.bank.z.device))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        projection = {f"projection.{name}": value for name, value in self.projection.named_parameters()}
        return {**self.objective.adapters.tensors("default"), **projection}

    def memory_vector(self, batch: Batch) -> Tensor:
        """CRL clusters h, not logits."""
        return self.objective.features(batch)

    def after_task(self, task: Task, index: int) -> None:
        """Selects the memory and recomputes the prototypes: class means of h over the memory or the drawn examples."""
        super().after_task(task, index)
        rows = self.drawn
        if isinstance(self.replay, FixedReplay):
            rows = np.concatenate([*self.replay.memory.values(), *self.replay.val_memory.values()])
        h = self.embed(rows, self.objective.features)
        labels = torch.from_numpy(self.data.train.labels[rows]).to(h.device)
        present = labels.unique().tolist()
        self.labels = sorted({*self.labels, *present})
        for label in present:
            self.prototypes[label] = h[labels == label].mean(0)

    def state_dict(self) -> State:
        """Without the prototypes of labels that are still to come: what is stored does not depend on later tasks."""
        state, seen = super().state_dict(), max(self.labels, default=-1) + 1
        return {**state, "crl": {**cast(State, state["crl"]), "prototypes": self.prototypes[:seen].clone()}}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        missing = len(self.benchmark.labels) - len(self.prototypes)  # a run with fewer tasks had fewer labels
        self.prototypes = F.pad(self.prototypes, (0, 0, 0, missing))

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Scores are minus the squared distances to the prototypes, and minus infinity for classes without one."""
        h = self.objective.features(batch)
        scores = h.new_full((len(h), len(self.prototypes)), float("-inf"))
        if self.labels:
            scores[:, self.labels] = -torch.cdist(h, self.prototypes[self.labels]).square()
        return Predictions(scores)

    def stored_parameters(self) -> int:
        return super().stored_parameters() + len(self.labels) * self.objective.dim  # prototypes that exist
