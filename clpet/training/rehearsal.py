"""A trainer that makes a few steps of every fit and measures them, for the estimate of a dry run."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from clpet.data.batches import EncodedDataset
from clpet.objectives.base import Objective
from clpet.replay.batch_plan import BatchPlan, Rows
from clpet.runtime.distributed import get_world
from clpet.runtime.tensor_memory import PeakMemory
from clpet.training.fit_checkpoint import FitState
from clpet.training.progress import NoProgress
from clpet.training.step import StepHooks
from clpet.training.trainer import Trainer

MEASURED_STEPS = 2  # for memory, with the heaviest batch: the first creates the optimiser's state, the second has it
TIMED_STEPS = 3


@dataclass
class Sample:
    """Timed steps of a stage: their seconds, padded tokens and floating-point operations, on this rank."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def add(self, other: "Sample") -> None:
        """Adds other steps."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.flops += other.flops


class Rehearsal(Trainer):
    """Fits of a dry run: steps on the heaviest batch, whose memory is measured, then `TIMED_STEPS` on usual ones."""

    dry_run = True

    def prepare(self, memory: PeakMemory) -> None:
        """Sets what measures memory; called before the first fit."""
        self.memory, self.progress = memory, NoProgress()
        self.samples: dict[str, Sample] = {}  # by stage
        self.fit_flops = 0.0  # of all steps of the present task
        self.at_step = self.activations = 0  # bytes before a step on the heaviest batch, and the most added in one

    @property
    def epochs(self) -> int:
        return 1

    def rows(self, plan: BatchPlan) -> np.ndarray:
        return super().rows(self.shortened(plan))

    def fit(
        self,
        plan: BatchPlan,
        parameters: Mapping[str, nn.Parameter],
        hooks: StepHooks,
        *,
        stage: str = "",
        clip: float | None = None,
    ) -> None:
        """Fits the few steps of a shortened plan."""
        self.memory.start()
        super().fit(self.shortened(plan), parameters, hooks, stage=stage, clip=clip)
        self.memory.start()

    def shortened(self, plan: BatchPlan) -> BatchPlan:
        """The plan with one epoch: the heaviest batch, repeated, and batches of every size.

        A plan without batches remains as it is.
        """
        batches = plan.epoch(0)
        if not batches:
            return plan
        tokens = [heaviest_tokens(self.objective, plan.pool, rows) for rows in batches]
        order = np.argsort(tokens, kind="stable")
        positions = np.linspace(0, len(batches) - 1, TIMED_STEPS + 2)[1:-1].round().astype(int)
        chosen = [batches[order[-1]]] * MEASURED_STEPS + [batches[order[position]] for position in positions]
        return replace(plan, steps=len(chosen), epoch=lambda _: chosen)

    def _step(
        self, plan: BatchPlan, hooks: StepHooks, clip: float, fit: FitState, rows: Rows, lr: float, planned: bool
    ) -> None:
        meter, timed = self.objective.meter, fit.step >= MEASURED_STEPS
        flops = meter.cost.forward_flops + meter.cost.backward_flops
        if timed:
            self.memory.stop()
        self._synchronize()
        before, start = self.memory.now, time.perf_counter()
        super()._step(plan, hooks, clip, fit, rows, lr, planned)
        self._synchronize()
        seconds = time.perf_counter() - start
        performed = meter.cost.forward_flops + meter.cost.backward_flops - flops
        self.fit_flops += performed
        if timed:
            sample = Sample(seconds, batch_tokens(self.objective, plan.pool, rows), performed)
            self.samples.setdefault(fit.stage, Sample()).add(sample)
        elif fit.step > 1:  # the optimiser's state exists
            self.at_step = max(self.at_step, before)
            self.activations = max(self.activations, self.memory.peak - before)

    def _synchronize(self) -> None:
        if self.hardware.torch_device.type == "cuda":
            torch.cuda.synchronize()


def micro_batch_tokens(objective: Objective, pool: EncodedDataset, rows: Rows) -> list[int]:
    """Padded tokens of this rank's micro-batches of a step; what limits micro-batches is in `objective.micro_batches`.

    Rows without a gradient count as well.
    """
    micro_batches = get_world().micro_batches(rows, lambda mine: objective.micro_batches.divide(pool, mine))
    return [pool.padded_tokens(micro_batch) for micro_batch, _ in micro_batches]


def batch_tokens(objective: Objective, pool: EncodedDataset, rows: Rows) -> int:
    """Padded tokens that a rank computes for a batch."""
    return sum(micro_batch_tokens(objective, pool, rows))


def heaviest_tokens(objective: Objective, pool: EncodedDataset, rows: Rows) -> int:
    """Padded tokens of the largest micro-batch of a batch."""
    return max(micro_batch_tokens(objective, pool, rows), default=0)
