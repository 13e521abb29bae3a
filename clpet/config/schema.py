"""The typed configuration: what a run is made of, its identity, and the one place that builds objects from it.

Every config group names a dataclass by `_target_`. The dataclass holds the types and the checks, the YAML
holds the values and a comment per knob. `build` merges the two: there is no second schema.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clpet.errors import ConfigError

OBJECT_GROUPS = ("method", "replay", "model", "peft", "benchmark", "hardware", "tracking")


class Schedule(Enum):
    """How the learning rate moves (clpet/training/lr_schedules.py)."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    ar = "ar"
    infinite = "infinite"


class OptimizerState(Enum):
    """What becomes of the optimiser's moments between tasks."""

    reset = "reset"
    carry = "carry"


class OnNan(Enum):
    """What is done about a loss that is no number."""

    stop = "stop"
    skip = "skip"


class Select(Enum):
    """Which state of a task's training is kept."""

    last = "last"
    best = "best"


class Matrix(Enum):
    """How much of the transfer matrix is measured."""

    full = "full"
    seen = "seen"
    last = "last"


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raises ConfigError('KEY must be WANTED, not VALUE') unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} must be {wanted}, not {value}")


@dataclass
class Training:
    """How one task is trained, the same for every method."""

    epochs: Any = 3  # or a list
    lr: Any = 1e-3  # or a list
    global_batch_size: int = 16
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    schedule: Schedule = Schedule.constant
    lr_min: float = 0.0
    lr_constant: float | None = None
    anneal_share: float = 0.1
    warmup_steps: int = 0
    warmup_share: float | None = None
    optimizer_state: OptimizerState = OptimizerState.reset
    clip: float = 0.0
    on_nan: OnNan = OnNan.stop
    select: Select = Select.last
    save_minutes: float = 10.0
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        passes = self.epochs if isinstance(self.epochs, list) and self.epochs else [self.epochs]
        fits = all(type(count) is int and count >= 1 for count in passes)
        require(fits, "train.epochs", self.epochs, "at least 1, or a list of such numbers, one a task")
        rates = self.lr if isinstance(self.lr, list) and self.lr else [self.lr]
        fits = all(type(rate) in (int, float) and rate >= 0 for rate in rates)
        require(fits, "train.lr", self.lr, "0 or more, or a list of such numbers, one a task")
        require(self.global_batch_size >= 1, "train.global_batch_size", self.global_batch_size, "at least 1")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        inside = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(inside, "train.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "train.eps", self.eps, "more than 0")
        require(0 <= self.lr_min <= min(rates), "train.lr_min", self.lr_min, f"from 0 to train.lr={self.lr}")
        held = self.lr_constant
        require(held is None or held >= 0, "train.lr_constant", held, "0 or more, or null")
        require(0 <= self.anneal_share <= 1, "train.anneal_share", self.anneal_share, "in [0, 1]")
        share = self.warmup_share
        require(share is None or 0 <= share <= 1, "train.warmup_share", share, "in [0, 1], or null")
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        require(self.clip >= 0, "train.clip", self.clip, "0 (off) or more")
        require(self.save_minutes > 0, "train.save_minutes", self.save_minutes, "more than 0")
        every = self.snapshot_every
        require(every >= 0, "train.snapshot_every", every, "0 (only the latest) or a number of tasks")

    def lr_of(self, task: int) -> float:
        """The learning rate of a task, counted from 0; the last one of a list is for all that follow."""
        return _of_task(self.lr, task)

    def epochs_of(self, task: int) -> int:
        """The epochs of a task, counted from 0; the last number of a list is for all that follow."""
        return _of_task(self.epochs, task)


def _of_task(setting: Any, task: int) -> Any:
    """A setting, or the item of a list of them that is a task's."""
    return setting[min(task, len(setting) - 1)] if isinstance(setting, list) else setting


class Decode(Enum):
    """How a text_to_text model answers."""

    generate = "generate"
    rank = "rank"


class Split(Enum):
    """Which held-out examples the matrix is measured on."""

    test = "test"
    validation = "validation"


class CapUnit(Enum):
    """What evaluation.max_tokens counts."""

    tokens = "tokens"
    bytes = "bytes"


@dataclass
class Evaluation:
    """What is scored when, and how answers are found."""

    split: Split = Split.test
    validation: bool = True
    matrix: Matrix = Matrix.full
    every: int = 1
    predictions: bool = True
    decode: Decode = Decode.generate
    max_new_tokens: int | None = None
    max_tokens: int | None = 100_000
    cap_unit: CapUnit = CapUnit.tokens
    stride: int | None = None
    bos: bool = False
    rank_prompts: int = 0

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "at least 1")
        require(self.rank_prompts >= 0, "evaluation.rank_prompts", self.rank_prompts, "0 (off) or more")
        for key, least in (("max_new_tokens", 1), ("max_tokens", 2), ("stride", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, f"evaluation.{key}", value, f"at least {least}, or null")


@dataclass
class Config:
    """Everything one run is made of; the groups are still config nodes, built when their turn comes."""

    method: Any
    replay: Any
    model: Any
    peft: Any
    benchmark: Any
    hardware: Any
    tracking: Any
    train: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    output_dir: str = "outputs"
    cache_dir: str | None = None
    data_dir: str | None = None
    fresh: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for group in OBJECT_GROUPS:
            node = getattr(self, group)
            require(isinstance(node, dict) and "_target_" in node, group, node, f"an option of the group conf/{group}")
        for group in ("method", "benchmark"):  # they name the run directory
            name = str(getattr(self, group).get("name", ""))
            fits = re.fullmatch(r"\w[\w.-]*", name)
            require(bool(fits), f"{group}.name", repr(name), "letters, digits, _, - and .")
