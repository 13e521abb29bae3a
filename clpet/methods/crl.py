"""CRL: contrastive learning over a bank of representations, with distillation of class relations.

ConPET's baseline and, with replay=dynamic, its starred version (ConPET, section 3.5). Notation:
h features, z = normalise(W2 relu(W1 h + b1) + b2), s_ia = z_i . z_a / tau.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.base import Choices, Method, Predictions
from clpet.methods.components.contrastive import Bank, contrastive, draw, relation_distillation
from clpet.replay.batch_plan import BatchPlan, split_batch
from clpet.replay.exemplar import FixedReplay
from clpet.replay.exemplar_selection import random_features
from clpet.replay.sampled import SampledReplay
from clpet.runtime.distributed import get_world
from clpet.training.trainer import Trainer


@dataclass
class CRL(Method):
    """Answers by the nearest class mean in h space; it has no linear head."""

    tau: float = 0.1
    temperature: float = 10.0
    dim: int = 64
    sample: int = 500
    min_per_class: int = 10
    eps: float = 1e-4
    clip: float = 10.0

    objectives: ClassVar[tuple[str, ...]] = ("classification",)
    uses_replay: ClassVar[bool] = True
    uses_validation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.tau > 0, "method.tau", self.tau, "more than 0")
        require(self.dim >= 1, "method.dim", self.dim, "at least 1")
        require(self.sample >= 1, "method.sample", self.sample, "at least 1")

    def check(self, objective: str, replay: str, peft: str) -> None:
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
        self.known: list[int] = []  # labels that have a prototype

    def project(self, h: Tensor) -> Tensor:
        """[batch, dim of h] -> [batch, dim of z], of length one."""
        return F.normalize(self.projection(h), dim=1)

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.old = list(self.known)
        self.stage(trainer, index, "contrast", self.first(index))
        if index > 0:
            if not self.starred:
                self.replay.update_memory(index, self.vectors)
            self.stage(trainer, index, "replay", self.second(index, trainer.epochs))

    @property
    def starred(self) -> bool:
        """Whether old examples are drawn from the history and not from a memory chosen per class."""
        return not isinstance(self.replay, FixedReplay)

    def stage(self, trainer: Trainer, index: int, name: str, plan: BatchPlan) -> None:
        """One fit with a fresh bank over the rows that its plan draws."""
        self.drawn = rows = trainer.rows(plan)
        z = self.embed(rows, lambda batch: self.project(self.objective.features(batch)))
        self.bank = Bank(z, self.data.train.labels[rows], rows, len(self.data.train), len(self.benchmark.labels))
        self.olds = torch.tensor(self.old, device=z.device)
        self.distil = name == "replay" and bool(self.old)
        self.sampled = name == "contrast" or self.starred
        self.rng = np.random.default_rng(derive(self.seed, "bank", index, name))
        self.passed: list[tuple[np.ndarray, Tensor]] = []
        trainer.fit(
            plan,
            self.loss,
            self.named_parameters(),
            stage=name,
            clip=self.clip,
            before_step=self.meet,
            adjust_gradients=self.take,
            after_step=self.refresh,
        )

    def first(self, index: int) -> BatchPlan:
        """Batches of stage 1: all of the new task."""
        return self.shuffled(self.data.train.rows_of(index), index, "contrast")

    def second(self, index: int, epochs: int) -> BatchPlan:
        """Batches of stage 2: the memory (fixed), or examples drawn once for one pass (starred)."""
        pool = self.data.train
        if isinstance(self.replay, FixedReplay):
            rows = np.concatenate([*self.replay.memory.values(), *self.replay.val_memory.values()])
            return self.shuffled(rows, index, "replay")
        if not isinstance(self.replay, SampledReplay):
            return self.replay.plan(index, "replay")
        steps = self.replay.limit or self.replay.plan(index).steps
        rng = self.replay.rng(index, "crl")
        n_new, n_old = split_batch(self.replay.batch_size, self.replay.ratio)
        olds = [self.replay.memory[task] for task in sorted(self.replay.memory)]
        old = draw(pool.labels, olds, n_old * steps * epochs, self.min_per_class, rng)
        new = draw(pool.labels, [pool.rows_of(index)], n_new * steps * epochs, self.min_per_class, rng)
        batches = [
            np.concatenate([new[i * n_new : (i + 1) * n_new], old[i * n_old : (i + 1) * n_old]])
            for i in range(steps * epochs)
        ]
        return BatchPlan(pool, steps, lambda epoch: batches[epoch * steps : (epoch + 1) * steps])

    def shuffled(self, rows: np.ndarray, index: int, stage: str) -> BatchPlan:
        """Ordinary epochs over `rows`."""
        size = self.replay.batch_size
        rng = self.replay.rng
        return BatchPlan(
            self.data.train,
            -(-len(rows) // size),
            lambda epoch: self.data.train.shuffled(rows, size, rng(index, stage, epoch)),
        )

    def stages(self, index: int) -> dict[str, BatchPlan]:
        plans = {"contrast": self.first(index)}
        if index > 0:
            if not self.starred:
                self.replay.update_memory(index, random_features)
            plans["replay"] = self.second(index, epochs=1)
        return plans

    def meet(self, rows: np.ndarray) -> None:
        """Chooses the entries of the bank that a step compares with, and counts the batch's rows of old classes.

        Both are those of the whole batch, the same for all of its micro-batches and ranks.
        """
        labels = self.data.train.labels[rows]
        self.inside = self.bank.sample(labels, self.sample, self.rng) if self.sampled else slice(None)
        self.old_share = float(np.isin(labels, self.old).mean())

    def loss(self, batch: Batch) -> Tensor:
        """L_CL, a mean over the batch, plus in stage 2 L_KD, a mean over the batch's examples of old classes."""
        z, inside = self.project(self.objective.features(batch)), self.inside
        self.passed.append((batch.rows, z.detach()))
        loss = contrastive(z, batch.labels, self.bank.z[inside], self.bank.labels[inside], self.tau, self.eps)
        if self.distil and self.old_share:
            mine = torch.isin(batch.labels, self.olds)
            place = torch.searchsorted(self.olds, batch.labels).clamp(max=len(self.olds) - 1)
            means, prototypes = self.bank.means()[self.olds], self.prototypes[self.olds]
            kl = relation_distillation(z, place, prototypes, means, self.temperature)
            loss = loss + (kl * mine).mean() / self.old_share
        return loss

    def take(self) -> None:
        """The representations of a step, from all ranks; those of one that is left out go with it."""
        self.fresh, self.passed = [one for passed in get_world().gather(self.passed) for one in passed], []

    def refresh(self) -> None:
        """The bank takes the representations of the step's examples."""
        for rows, z in self.fresh:
            self.bank.update(rows, z.to(self.bank.z.device))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        projection = {f"projection.{name}": value for name, value in self.projection.named_parameters()}
        return {**self.objective.adapters.tensors("default"), **projection}

    def memory_vector(self, batch: Batch) -> Tensor:
        """CRL clusters h, not logits."""
        return self.objective.features(batch)

    def after_task(self, task: Task, index: int) -> None:
        """Selects memory anew and recomputes the prototypes: means of h over the memory or the drawn examples."""
        super().after_task(task, index)
        rows = self.drawn
        if isinstance(self.replay, FixedReplay):
            rows = np.concatenate([*self.replay.memory.values(), *self.replay.val_memory.values()])
        h = self.embed(rows, self.objective.features)
        labels = torch.from_numpy(self.data.train.labels[rows]).to(h.device)
        present = labels.unique().tolist()
        self.known = sorted({*self.known, *present})
        for label in present:
            self.prototypes[label] = h[labels == label].mean(0)

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Minus the squared distance to each prototype; a class without one cannot be answered."""
        h = self.objective.features(batch)
        scores = h.new_full((len(h), len(self.prototypes)), float("-inf"))
        if self.known:
            scores[:, self.known] = -torch.cdist(h, self.prototypes[self.known]).square()
        return Predictions(scores)

    def stored_parameters(self) -> int:
        extra = sum(p.numel() for p in self.projection.parameters())
        return super().stored_parameters() + extra + len(self.known) * self.objective.dim

    def state_dict(self) -> dict[str, Any]:
        own = {"prototypes": self.prototypes, "known": self.known, "projection": dict(self.projection.state_dict())}
        return {**super().state_dict(), "crl": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own = state["crl"]
        self.prototypes.copy_(own["prototypes"])
        self.known = list(own["known"])
        self.projection.load_state_dict(own["projection"])

    def task_state(self) -> dict[str, Any]:
        return {"z": self.bank.z, "sums": self.bank.sums, "rng": self.rng.bit_generator.state}

    def load_task_state(self, state: dict[str, Any]) -> None:
        self.bank.z.copy_(state["z"])
        self.bank.sums.copy_(state["sums"])
        self.rng.bit_generator.state = state["rng"]
