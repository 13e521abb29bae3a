"""KIF: after every task, old and new weights are fused unit by unit according to their importance.

Feng et al., 2024, arXiv 2408.05200. While task k is trained with
    L = CE + lambda mean over LoRA pairs of (||A A^T - I||_F, ||B^T B - I||_F),    lambda = orth_strength,
which keeps the ranks of a LoRA distinct, the importance I_k of every unit is measured (components/importance.py).
After the task, with p = Norm(J_{k-1}) and c = Norm(I_k), each unit becomes w new + (1 - w) old:
    adaptive  w = sigmoid((c - p) / tau)
    static    w = 1 - gamma (p and c above their percentile), 0 (only p), 1 (only c), 1/2 (neither)
    uniform   w = 1/2
    none      w = 1
Then importance is accumulated, J_k = Norm(beta Norm(J_{k-1}) + (1 - beta) Norm(I_k)) with J_1 = I_1. Nothing else of a
task is stored.

unit=matrix, score=first, fusion=static is TaSL (arXiv 2408.09857).
"""

from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.benchmark import Task
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.importance import (
    SCORES,
    Importance,
    ParameterGroups,
    above_percentile,
    accumulate,
    adaptive,
    fuse,
    gradients,
    norm,
    orthogonality,
    static,
    unflat,
)
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.records import Figures
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.sharding.tensors import local
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

OPTIONS = {
    "unit": ("lora_rank", "matrix"),
    "score": SCORES,
    "weight_at": ("post_step", "pre_step"),
    "gradient": ("clipped", "raw"),
    "unit_score": ("product_of_means", "mean_of_concat"),
    "fusion": ("adaptive", "static", "uniform", "none"),
    "replay_phase": ("union", "after"),
}


class TaskRecord(TypedDict):
    """What is recorded of a task, for figures and diagnostics."""

    importance: dict[str, Tensor]  # group -> Norm(I_k) [units of the group]
    figures: dict[str, float]


@dataclass
class KIF(Method):
    """Importance uses the gradient of the full loss and, as in the published code, the weights after the step."""

    unit: str = "lora_rank"
    score: str = "mix"
    weight_at: str = "post_step"
    gradient: str = "clipped"
    skip_first_step: bool = True
    beta1: float = 0.85
    beta2: float = 0.85
    unit_score: str = "product_of_means"
    fusion: str = "adaptive"
    tau: float = 0.25
    percentile: float = 80.0
    strict: bool = True
    gamma: float = 0.7
    beta: float = 0.7
    orth_strength: float = 0.1
    orth_squared: bool = False
    replay_phase: str = "union"

    uses_replay: ClassVar[bool] = True
    saved: ClassVar[tuple[str, ...]] = ("accumulated=kif.accumulated",)
    saved_uncounted: ClassVar[tuple[str, ...]] = ("history=kif.history",)
    saved_in_task: ClassVar[tuple[str, ...]] = ("importance",)

    def __post_init__(self) -> None:
        for option, values in OPTIONS.items():
            require(getattr(self, option) in values, f"method.{option}", getattr(self, option), " or ".join(values))
        for option in ("beta1", "beta2"):
            require(0 <= getattr(self, option) < 1, f"method.{option}", getattr(self, option), "in [0, 1)")
        for option in ("gamma", "beta"):
            require(0 <= getattr(self, option) <= 1, f"method.{option}", getattr(self, option), "in [0, 1]")
        require(self.tau > 0, "method.tau", self.tau, "more than 0")
        require(0 <= self.percentile <= 100, "method.percentile", self.percentile, "in [0, 100]")
        require(self.orth_strength >= 0, "method.orth_strength", self.orth_strength, "0 (off) or more")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if self.unit == "lora_rank" and not peft.traits.lora_factors:
            raise ConfigError(f"method.unit=lora_rank needs peft=lora; with peft={peft.name} use method.unit=matrix")
        if self.replay_phase == "after" and replay == "none":
            raise ConfigError("method.replay_phase=after needs a memory: set replay=share, for example")

    def ineffective(self) -> dict[str, str]:
        ranks = self.unit == "lora_rank"
        used = {"tau": self.fusion == "adaptive", "gamma": self.fusion == "static", "unit_score": ranks,
                "orth_strength": ranks, "orth_squared": ranks and self.orth_strength > 0}  # fmt: skip
        reason = f"it is not for method.unit={self.unit} with method.fusion={self.fusion}"
        return {f"method.{name}": reason for name, on in used.items() if not on}

    def init_adapters(self) -> None:
        super().init_adapters()
        self.accumulated: dict[str, Tensor] = {}  # J: group -> [units of the group], fp64
        self.history: list[TaskRecord] = []  # per task
        self.importance: Importance | None = None  # I of the current task
        self.old_weights: dict[str, Tensor] = {}  # the scored tensors before the current task

    def scored(self) -> dict[str, Tensor]:
        """The tensors that units consist of; tied tensors occur once."""
        adapter = self.objective.adapters.tensors("default")
        if self.unit == "lora_rank":
            return {name: value for name, value in adapter.items() if ".lora_A." in name or ".lora_B." in name}
        adapter_ids = {id(value) for value in adapter.values()}
        rest = [value for value in self.parameters() if id(value) not in adapter_ids]
        return {**adapter, **{f"head.{i}": value for i, value in enumerate(rest)}}

    def step_loss(self, context: StepContext) -> Tensor | None:
        """lambda mean(||A A^T - I||_F, ||B^T B - I||_F)."""
        if self.unit != "lora_rank" or not self.orth_strength:
            return None
        factors = [value.mT if ".lora_B." in name else value for name, value in self.live.items()]
        return self.orth_strength * orthogonality(factors, self.orth_squared)

    def plan(self, index: int) -> BatchPlan:
        return self.replay.plan(index) if self.replay_phase == "union" else self.replay.new_only_plan(index)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        plans = super().stages(index)
        if self.replay_phase == "after" and self.replay.memory:
            plans["replay"] = self.replay.memory_only_plan(index)
        return plans

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if self.accumulated and self.fusion != "none":
            self.old_weights = {name: local(value.detach()).clone() for name, value in self.scored().items()}
        super().learn(task, index, trainer)
        protected = self.consolidate()
        if self.replay_phase == "after" and self.replay.memory:
            self.replay_protected(trainer, index, protected)

    def fit(self, trainer: Trainer, index: int) -> None:
        self.start_importance()
        super().fit(trainer, index)

    def start_importance(self) -> None:
        """Starts a task's importance scores from 0; called after the head has grown, which replaces its tensors."""
        self.live = self.scored()
        self.units = ParameterGroups(self.live, self.unit == "lora_rank")
        size = sum(local(value.detach()).numel() for value in self.live.values())
        like, tensors = torch.zeros((), device=self.objective.device), list(self.live.values())
        self.importance = Importance(size, self.score, self.beta1, self.beta2, self.skip_first_step, like, tensors)

    def adjust_gradients(self, context: StepContext) -> None:
        """Copies what clipping and the step will change, if importance is to use it."""
        if self.weight_at == "pre_step":
            self.pre_step_weights = [local(value.detach()).clone() for value in self.live.values()]
        if self.gradient == "raw":
            self.raw_gradients = [value.clone() for value in gradients(self.live)]

    def after_step(self, context: StepContext) -> None:
        assert self.importance
        weights = self.pre_step_weights if self.weight_at == "pre_step" else list(self.live.values())
        self.importance.update(weights, self.raw_gradients if self.gradient == "raw" else gradients(self.live))

    def validate(self, index: int) -> float:
        """Keeps the importance of the best epoch, whose weights will be restored after the fit."""
        assert self.importance
        score = super().validate(index)
        self.importance.keep_best(score)
        return score

    def consolidate(self) -> Tensor:
        """Fuses old and new weights and accumulates importance; returns the mask [units] of units important before."""
        assert self.importance
        self.importance.restore_best()
        scores = self.units.scores(unflat(self.importance.elements(), self.live), self.unit_score)
        # p = Norm(J_{k-1}) and c = Norm(I_k)
        old = norm(self.units.join(self.accumulated)) if self.accumulated else torch.zeros_like(scores)
        new = norm(scores)
        protected = above_percentile(old, self.percentile, self.strict)
        figures = {"skipped_steps": float(self.importance.skipped)}
        if self.accumulated:
            important = above_percentile(new, self.percentile, self.strict)
            weight = self.new_weight(old, new, protected, important)
            self.blend(weight)
            scores = accumulate(old, new, self.beta)  # J_k
            figures |= unit_percentages(protected, important)
            figures |= {"new_weight_mean": weight.mean().item(), "new_weight_std": weight.std(correction=0).item()}
        self.accumulated = self.units.split(scores)
        self.history.append({"importance": self.units.split(new.float().cpu()), "figures": figures})
        self.importance, self.old_weights = None, {}
        return protected

    def new_weight(self, old: Tensor, new: Tensor, protected: Tensor, important: Tensor) -> Tensor:
        """w [units], the weight of the new value, from p, c and the masks of values above their percentile."""
        if self.fusion == "adaptive":
            return adaptive(old, new, self.tau)
        if self.fusion == "static":
            return static(protected, important, self.gamma)
        return torch.full_like(old, 0.5 if self.fusion == "uniform" else 1.0)

    @torch.no_grad()
    def blend(self, weight: Tensor) -> None:
        """Sets the scored tensors to w new + (1 - w) old; tensors without an old value keep the new one."""
        for name, w in self.units.broadcast(weight).items():
            if name in self.old_weights:
                new = local(self.live[name].detach())
                new.copy_(fuse(self.old_weights[name], new, w))

    def replay_protected(self, trainer: Trainer, index: int, protected: Tensor) -> None:
        """Replay after the fusion (replay_phase=after): trains only the units that are important to earlier tasks."""
        trained = self.units.broadcast(protected)
        fused = {name: local(value.detach()).clone() for name, value in self.live.items()}

        def mask(context: StepContext) -> None:
            for name, gradient in zip(self.live, gradients(self.live), strict=True):
                gradient.mul_(trained[name])

        @torch.no_grad()
        def restore(
            context: StepContext,
        ) -> None:  # weight decay and Adam's momentum also change weights whose gradient is 0
            for name, value in self.live.items():
                rows = local(value.detach())
                rows.copy_(torch.where(trained[name], rows, fused[name]))

        hooks = StepHooks(self.loss, step_loss=self.step_loss, adjust_gradients=mask, after_step=restore)
        trainer.fit(self.replay.memory_only_plan(index), self.named_parameters(), hooks, stage="replay")

    def diagnostics(self) -> dict[str, float]:
        return self.history[-1]["figures"] if self.history else {}

    def figures(self) -> Figures:
        tasks = self.benchmark.names[: len(self.history)]
        importance = [entry["importance"] for entry in self.history]
        fusions = [entry["figures"] for entry in self.history[1:]]  # the first task has nothing to be fused with
        figures: dict[str, dict[str, object]] = {"importance": {"history": importance, "tasks": tasks}}
        if fusions:
            figures["fusion"] = {"percentages": fusions, "tasks": tasks[1:]}
        return figures


def unit_percentages(old: Tensor, new: Tensor) -> dict[str, float]:
    """Percent of units important to earlier tasks only, to both, to the new task only, and to none, from two masks."""
    groups = torch.stack([old & ~new, old & new, new & ~old, ~(old | new)])
    percent = (100 * groups.double().mean(1)).tolist()
    return dict(zip(("units_kept", "units_shared", "units_taken", "units_averaged"), percent, strict=True))
