"""KIF: old and new weights are fused after every task, unit by unit, by their importance (arXiv 2408.05200).

L = loss + lambda mean(||A A^T - I||_F, ||B^T B - I||_F over the LoRA pairs), lambda = orth_strength: ranks stay apart.
While task k is trained, the importance I_k of every unit is measured (components/importance.py). After it, with
p = Norm(J_{k-1}) and c = Norm(I_k), each unit becomes w new + (1 - w) old:
    adaptive  w = sigmoid((c - p) / tau)
    static    w = 1 - gamma (p and c above their percentile), 0 (p alone), 1 (c alone), 1/2 (neither)
    uniform   w = 1/2                                   none    w = 1
and J_k = Norm(beta Norm(J_{k-1}) + (1 - beta) Norm(I_k)), J_1 = I_1. Nothing else is kept of a task.

unit=matrix, score=first, fusion=static is TaSL (arXiv 2408.09857).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.data.batches import Batch
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
from clpet.replay.batch_plan import BatchPlan
from clpet.training.trainer import Trainer

KNOWN = {
    "unit": ("lora_rank", "matrix"),
    "score": SCORES,
    "weight_at": ("post_step", "pre_step"),
    "gradient": ("clipped", "raw"),
    "unit_score": ("product_of_means", "mean_of_concat"),
    "fusion": ("adaptive", "static", "uniform", "none"),
    "replay_phase": ("union", "after"),
}


@dataclass
class KIF(Method):
    """Importance uses the gradient of the whole loss and, as published, weights from after the step."""

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

    def __post_init__(self) -> None:
        for knob, known in KNOWN.items():
            require(getattr(self, knob) in known, f"method.{knob}", getattr(self, knob), " or ".join(known))
        for knob in ("beta1", "beta2"):
            require(0 <= getattr(self, knob) < 1, f"method.{knob}", getattr(self, knob), "in [0, 1)")
        for knob in ("gamma", "beta"):
            require(0 <= getattr(self, knob) <= 1, f"method.{knob}", getattr(self, knob), "in [0, 1]")
        require(self.tau > 0, "method.tau", self.tau, "more than 0")
        require(0 <= self.percentile <= 100, "method.percentile", self.percentile, "in [0, 100]")
        require(self.orth_strength >= 0, "method.orth_strength", self.orth_strength, "0 (off) or more")

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if self.unit == "lora_rank" and peft != "lora":
            raise ConfigError(f"method.unit=lora_rank needs peft=lora; with peft={peft} take method.unit=matrix")
        if self.replay_phase == "after" and replay == "none":
            raise ConfigError("method.replay_phase=after needs a memory: replay=share, for example")

    def init_adapters(self) -> None:
        super().init_adapters()
        self.accumulated: dict[str, Tensor] = {}  # J: group -> its units, fp64
        self.history: list[dict[str, Any]] = []  # of every task: what its pictures and diagnostics show
        self.importance: Importance | None = None  # of the task being learned
        self.before: dict[str, Tensor] = {}  # scored tensors as the task found them

    def scored(self) -> dict[str, Tensor]:
        """The tensors that units are made of; tied ones occur once."""
        adapter = self.objective.adapters.tensors("default")
        if self.unit == "lora_rank":
            return {name: value for name, value in adapter.items() if ".lora_A." in name or ".lora_B." in name}
        inside = {id(value) for value in adapter.values()}
        rest = [value for value in self.parameters() if id(value) not in inside]
        return {**adapter, **{f"head.{i}": value for i, value in enumerate(rest)}}

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        if self.unit != "lora_rank" or not self.orth_strength:
            return loss
        factors = [value.mT if ".lora_B." in name else value for name, value in self.live.items()]
        return loss + self.orth_strength * orthogonality(factors, self.orth_squared)

    def plan(self, index: int) -> BatchPlan:
        return self.replay.plan(index) if self.replay_phase == "union" else self.replay.new_only_plan(index)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        again = self.replay_phase == "after" and self.replay.memory
        return {**super().stages(index), **({"replay": self.replay.memory_only_plan(index)} if again else {})}

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        if self.accumulated and self.fusion != "none":
            self.before = {name: value.detach().clone() for name, value in self.scored().items()}
        super().learn(task, index, trainer)
        protected = self.consolidate()
        if self.replay_phase == "after" and self.replay.memory:
            self.rehearse(trainer, index, protected)

    def fit(self, trainer: Trainer, index: int) -> None:
        self.begin()
        super().fit(trainer, index)

    def begin(self) -> None:
        """New scores, for the tensors as they are once the head has grown."""
        self.live = self.scored()
        self.units = ParameterGroups(self.live, self.unit == "lora_rank")
        size = sum(value.numel() for value in self.live.values())
        place = torch.zeros((), device=self.objective.device)
        self.importance = Importance(size, self.score, self.beta1, self.beta2, self.skip_first_step, place)

    def adjust_gradients(self) -> None:
        """What clipping and the step will change."""
        if self.weight_at == "pre_step":
            self.weights_before = [value.detach().clone() for value in self.live.values()]
        if self.gradient == "raw":
            self.raw = [value.clone() for value in gradients(self.live)]

    def after_step(self) -> None:
        assert self.importance
        weights = self.weights_before if self.weight_at == "pre_step" else list(self.live.values())
        self.importance.update(weights, self.raw if self.gradient == "raw" else gradients(self.live))

    def validate(self, index: int) -> float:
        """Importance is that of the weights that are chosen."""
        assert self.importance
        score = super().validate(index)
        self.importance.keep(score)
        return score

    def consolidate(self) -> Tensor:
        """Fuses and accumulates; returns which units earlier tasks need."""
        assert self.importance
        self.importance.restore()
        scores = self.units.scores(unflat(self.importance.elements(), self.live), self.unit_score)
        old = norm(self.units.join(self.accumulated)) if self.accumulated else torch.zeros_like(scores)
        new = norm(scores)
        protected = above_percentile(old, self.percentile, self.strict)
        figures = {"skipped_steps": float(self.importance.skipped)}
        if self.accumulated:
            wanted = above_percentile(new, self.percentile, self.strict)
            weight = self.new_weight(old, new, protected, wanted)
            self.blend(weight)
            scores = accumulate(old, new, self.beta)
            figures |= shares(protected, wanted)
            figures |= {"new_weight_mean": weight.mean().item(), "new_weight_std": weight.std(correction=0).item()}
        self.accumulated = self.units.split(scores)
        self.history.append({"importance": self.units.split(new.float().cpu()), "figures": figures})
        self.importance, self.before = None, {}
        return protected

    def new_weight(self, old: Tensor, new: Tensor, protected: Tensor, wanted: Tensor) -> Tensor:
        """[units]: w."""
        if self.fusion == "adaptive":
            return adaptive(old, new, self.tau)
        if self.fusion == "static":
            return static(protected, wanted, self.gamma)
        return torch.full_like(old, 0.5 if self.fusion == "uniform" else 1.0)

    @torch.no_grad()
    def blend(self, weight: Tensor) -> None:
        """Scored tensors become their fusion; what has no old value keeps the new one."""
        for name, w in self.units.broadcast(weight).items():
            if name in self.before:
                self.live[name].copy_(fuse(self.before[name], self.live[name], w))

    def rehearse(self, trainer: Trainer, index: int, protected: Tensor) -> None:
        """Replay after the fusion: of the units, only those that earlier tasks need are trained."""
        free = self.units.broadcast(protected)
        held = {name: value.detach().clone() for name, value in self.live.items()}

        def mask() -> None:
            for name, gradient in zip(self.live, gradients(self.live), strict=True):
                gradient.mul_(free[name])

        @torch.no_grad()
        def hold() -> None:  # weight decay moves what has no gradient, too
            for name, value in self.live.items():
                value.copy_(torch.where(free[name], value, held[name]))

        plan, parameters = self.replay.memory_only_plan(index), self.named_parameters()
        trainer.fit(plan, self.loss, parameters, stage="replay", adjust_gradients=mask, after_step=hold)

    def diagnostics(self) -> dict[str, float]:
        return self.history[-1]["figures"] if self.history else {}

    def figures(self) -> dict[str, dict[str, Any]]:
        tasks = self.benchmark.names[: len(self.history)]
        importance = [entry["importance"] for entry in self.history]
        fusions = [entry["figures"] for entry in self.history[1:]]  # the first task has nothing to be fused with
        figures: dict[str, dict[str, Any]] = {"importance": {"history": importance, "tasks": tasks}}
        if fusions:
            figures["fusion"] = {"percentages": fusions, "tasks": tasks[1:]}
        return figures

    def stored_parameters(self) -> int:
        return super().stored_parameters() + sum(value.numel() for value in self.accumulated.values())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kif": {"accumulated": self.accumulated, "history": self.history}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own, device = state["kif"], self.objective.device
        self.accumulated = {name: value.to(device) for name, value in own["accumulated"].items()}
        self.history = own["history"]

    def task_state(self) -> dict[str, Any]:
        return {"importance": self.importance.state()} if self.importance else {}

    def load_task_state(self, state: dict[str, Any]) -> None:
        if self.importance:
            self.importance.load(state["importance"])


def shares(old: Tensor, new: Tensor) -> dict[str, float]:
    """Percent of the units that are important for earlier tasks alone, for both, for the new task alone, for none."""
    groups = torch.stack([old & ~new, old & new, new & ~old, ~(old | new)])
    percent = (100 * groups.double().mean(1)).tolist()
    return dict(zip(("units_kept", "units_shared", "units_taken", "units_averaged"), percent, strict=True))
