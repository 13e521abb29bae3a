"""The typed top level of a configuration: training and evaluation options, and the config groups.

The YAML of every config group names a dataclass in `_target_`. The dataclass has the types and the checks, the YAML the
values and a comment for each option; `build` merges the two, so there is no second schema.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar, cast

from clpet.errors import ConfigError
from clpet.records import Json

# The config groups that an object is built from; experiment and debug only set values in them.
OBJECT_GROUPS = ("method", "replay", "model", "peft", "objective", "benchmark", "hardware", "tracking")


# The structured configs of OmegaConf accept no union of a scalar with a list or a mapping: OmegaConf takes these fields
# as Any, and the `__post_init__` of their class checks the values.
if TYPE_CHECKING:
    IntOrList = int | list[int]
    FloatOrList = float | list[float]
    NamesOrRule = str | list[str]
    Patterns = str | dict[str, str | None] | None
    WordOrNumber = str | float | None
    Scalar = str | int | float | bool | None
    Node = dict[str, Json]
else:
    IntOrList = FloatOrList = NamesOrRule = Patterns = WordOrNumber = Scalar = Node = Any

T = TypeVar("T")


class Schedule(Enum):
    """Learning rate over the steps of a task (clpet/training/lr_schedules.py)."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    ar = "ar"
    infinite = "infinite"


class OptimizerState(Enum):
    """Moments of the optimiser at the start of a task."""

    reset = "reset"
    carry = "carry"


class OnNan(Enum):
    """Reaction to a NaN or infinite loss."""

    stop = "stop"
    skip = "skip"


class Select(Enum):
    """Epoch whose weights are kept after a task."""

    last = "last"
    best = "best"


class ClassWeights(Enum):
    """Weights of the labels in the loss of a classifier."""

    none = "none"
    balanced = "balanced"


class Matrix(Enum):
    """Cells of the transfer matrix that are measured."""

    full = "full"
    seen = "seen"
    last = "last"


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raises ConfigError('KEY must be EXPECTED, not VALUE') unless the condition is true."""
    if not condition:
        raise ConfigError(f"{key} must be {expected}, not {value}")


@dataclass
class Training:
    """Options of training on one task, the same for every method."""

    epochs: IntOrList = 3  # or a list
    lr: FloatOrList = 1e-3  # or a list
    global_batch_size: int = 16
    optimizer: str = "adamw"  # a name of clpet/training/optimizers.py, which checks it
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    momentum: float | None = None
    schedule: Schedule = Schedule.constant
    lr_min: float = 0.0
    lr_constant: float | None = None
    anneal_share: float = 0.1
    warmup_steps: int = 0
    max_warmup_share: float | None = None
    optimizer_state: OptimizerState = OptimizerState.reset
    clip: float = 0.0
    on_nan: OnNan = OnNan.stop
    select: Select = Select.last
    class_weights: ClassWeights = ClassWeights.none
    save_minutes: float = 10.0
    snapshot_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        self._check_per_task_lists()
        require(self.global_batch_size >= 1, "train.global_batch_size", self.global_batch_size, "at least 1")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(in_range, "train.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "train.eps", self.eps, "more than 0")
        momentum = self.momentum
        require(momentum is None or 0 <= momentum < 1, "train.momentum", momentum, "in [0, 1), or null")
        constant = self.lr_constant
        require(constant is None or constant >= 0, "train.lr_constant", constant, "0 or more, or null")
        require(0 <= self.anneal_share <= 1, "train.anneal_share", self.anneal_share, "in [0, 1]")
        share = self.max_warmup_share
        require(share is None or 0 <= share <= 1, "train.max_warmup_share", share, "in [0, 1], or null")
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        require(self.clip >= 0, "train.clip", self.clip, "0 (off) or more")
        require(self.save_minutes > 0, "train.save_minutes", self.save_minutes, "more than 0")
        every = self.snapshot_every
        require(every >= 0, "train.snapshot_every", every, "0 (only the latest) or a number of tasks")
        require(self.log_every >= 0, "train.log_every", self.log_every, "0 (off) or a number of steps")

    def _check_per_task_lists(self) -> None:
        """Checks epochs, lr and lr_min; YAML types cannot express "a number or a list of numbers"."""
        epochs = self.epochs if isinstance(self.epochs, list) and self.epochs else [self.epochs]
        valid = all(type(count) is int and count >= 1 for count in epochs)  # `type` excludes bool, a subclass of int
        require(valid, "train.epochs", self.epochs, "at least 1, or a list of such numbers, one per task")
        rates: list[float] = self.lr if isinstance(self.lr, list) and self.lr else [cast(float, self.lr)]
        valid = all(type(rate) in (int, float) and rate >= 0 for rate in rates)
        require(valid, "train.lr", self.lr, "0 or more, or a list of such numbers, one per task")
        require(0 <= self.lr_min <= min(rates), "train.lr_min", self.lr_min, f"from 0 to train.lr={self.lr}")

    def lr_of(self, task: int) -> float:
        """The learning rate of a task, counted from 0; the last one of a list applies to all later tasks."""
        return _of_task(self.lr, task)

    def epochs_of(self, task: int) -> int:
        """The epochs of a task, counted from 0; the last number of a list applies to all later tasks."""
        return _of_task(self.epochs, task)


def _of_task(setting: T | list[T], task: int) -> T:
    """A task's value of a setting that may be a list with one value per task."""
    return setting[min(task, len(setting) - 1)] if isinstance(setting, list) else setting


class Decode(Enum):
    """How text_to_text models answer: greedy decoding, or the most likely label."""

    generate = "generate"
    rank = "rank"


class Split(Enum):
    """Held-out examples that the transfer matrix is measured on."""

    test = "test"
    validation = "validation"


class LabelMetric(Enum):
    """Metrics of predicted labels; the transfer matrix has accuracies, the others are recorded separately."""

    accuracy = "accuracy"
    macro_f1 = "macro_f1"


class CapUnit(Enum):
    """Unit of evaluation.max_tokens."""

    tokens = "tokens"
    bytes = "bytes"


class Probe(Enum):
    """What is compared with the pretrained model after every task, and how well another task is learned then."""

    kl = "kl"
    nll = "nll"
    representation = "representation"
    weights = "weights"
    plasticity = "plasticity"


@dataclass
class EvaluationOptions:
    """Options of evaluation: which tasks are scored when, and how answers are produced."""

    split: Split = Split.test
    validation: bool = True
    matrix: Matrix = Matrix.full
    every: int = 1
    predictions: bool = True
    keep_text: bool = False
    metrics: list[LabelMetric] = field(default_factory=lambda: [LabelMetric.accuracy])
    decode: Decode = Decode.generate
    max_new_tokens: int | None = None
    max_tokens: int | None = 100_000
    cap_unit: CapUnit = CapUnit.tokens
    stride: int | None = None
    bos: bool = False
    rank_prompts: int = 0
    probes: list[Probe] = field(default_factory=list)
    probe_tokens: int | None = None
    probe_text: str | None = None
    probe_task: str | None = None
    probe_examples: int | None = 200
    downstream: list[str] = field(default_factory=list)
    downstream_every: int = 1
    downstream_limit: int | None = None
    downstream_dir: str | None = None

    def __post_init__(self) -> None:
        for key in ("every", "downstream_every"):
            require(getattr(self, key) >= 1, f"evaluation.{key}", getattr(self, key), "at least 1")
        require(LabelMetric.accuracy in self.metrics, "evaluation.metrics", self.metrics, "a list with accuracy")
        text_kept = self.predictions or not self.keep_text
        require(text_kept, "evaluation.keep_text", "true", "false with evaluation.predictions=false")
        require(self.rank_prompts >= 0, "evaluation.rank_prompts", self.rank_prompts, "0 (off) or more")
        needs_task, has_task = Probe.plasticity in self.probes, self.probe_task is not None
        require(
            has_task or not needs_task, "evaluation.probe_task", "null", "benchmark/NAME:TASK, for probes=[plasticity]"
        )
        require(
            needs_task or not has_task, "evaluation.probe_task", self.probe_task, "null without probes=[plasticity]"
        )
        at_least_1 = ("max_new_tokens", "stride", "probe_tokens", "probe_examples", "downstream_limit")
        for key, minimum in (*((key, 1) for key in at_least_1), ("max_tokens", 2)):
            value = getattr(self, key)
            require(value is None or value >= minimum, f"evaluation.{key}", value, f"at least {minimum}, or null")


@dataclass
class Config:
    """The configuration of one run; the groups are config nodes from which `build` makes objects later."""

    method: Node
    replay: Node
    model: Node
    peft: Node
    objective: Node
    benchmark: Node
    hardware: Node
    tracking: Node
    train: Training = field(default_factory=Training)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seed: int = 0
    output_dir: str = "outputs"
    cache_dir: str | None = None
    data_dir: str | None = None
    extend: str = "auto"
    fresh: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        require(bool(self.extend.strip()), "extend", repr(self.extend), "auto, off, or the folder of a run")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for group in OBJECT_GROUPS:
            node = getattr(self, group)
            require(isinstance(node, dict) and "_target_" in node, group, node, f"an option of the group conf/{group}")
        for group in ("method", "benchmark"):  # parts of the run directory's path
            name = str(getattr(self, group).get("name", ""))
            valid = re.fullmatch(r"\w[\w.-]*", name)
            require(bool(valid), f"{group}.name", repr(name), "letters, digits, _, - and .")
