"""The typed configuration: what a run is made of, its identity, and the one place that builds objects from it.

Every config group names a dataclass by `_target_`. The dataclass holds the types and the checks, the YAML
holds the values and a comment per knob. `build` merges the two: there is no second schema.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from clpet.errors import ConfigError, suggest

GROUPS = ("method", "replay", "model", "peft", "benchmark", "hardware", "tracking")
# What does not change a run's result, or only says where it goes, is no part of its identity.
NOT_IDENTITY = ("hydra", "hardware", "tracking", "output_dir", "cache_dir", "fresh", "dry_run", "seed")


def conf_dir() -> Path:
    """The folder of the shipped configs: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


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
    keep: int = 0

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
        require(self.keep >= 0, "train.keep", self.keep, "0 (only the end), or every how many tasks")

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
        for group in GROUPS:
            node = getattr(self, group)
            require(isinstance(node, dict) and "_target_" in node, group, node, f"an option of the group conf/{group}")
        for group in ("method", "benchmark"):  # they name the run directory
            name = str(getattr(self, group).get("name", ""))
            fits = re.fullmatch(r"\w[\w.-]*", name)
            require(bool(fits), f"{group}.name", repr(name), "letters, digits, _, - and .")


def typed(cfg: DictConfig) -> Config:
    """The composed config with every top-level knob checked; raises ConfigError on an unknown key or wrong type."""
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return _merge(Config, OmegaConf.to_container(plain, resolve=True), "")


def build(node: dict, where: str, **runtime: Any) -> Any:
    """The object that a config node names by `_target_`, its fields checked against the dataclass.

    This is the only place where a config decides which code runs: the class must belong to clpet or to a
    folder the user named with --config-dir. `runtime` sets attributes that are no knobs.
    """
    values = {key: value for key, value in node.items() if key != "_target_"}
    instance = _merge(find_class(str(node["_target_"]), where), values, where)
    for key, value in runtime.items():
        setattr(instance, key, value)
    return instance


def plugin_dirs() -> list[Path]:
    """The folders given with --config-dir: their Python files may be named by `_target_`."""
    return [Path(folder) for folder in os.environ.get("CLPET_CONFIG_DIR", "").split(os.pathsep) if folder]


def use_plugins(folder: str) -> None:
    """Makes a --config-dir known to `find_class`. Raises ConfigError where it is no folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is not a folder")
    os.environ["CLPET_CONFIG_DIR"] = str(Path(folder).resolve())


def find_class(target: str, where: str) -> type:
    """The dataclass that a `_target_` names, of clpet or of a --config-dir folder. Raises ConfigError."""
    module_name, _, class_name = target.rpartition(".")
    for folder in plugin_dirs():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        if module_name.partition(".")[0] != "clpet":
            spec = importlib.util.find_spec(module_name.partition(".")[0]) if module_name else None
            origin = Path(spec.origin).resolve() if spec and spec.origin else None
            if origin is None or not any(origin.is_relative_to(folder.resolve()) for folder in plugin_dirs()):
                raise ConfigError(
                    f"{where}._target_ names {target}, which is neither part of clpet nor in a --config-dir folder"
                )
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}._target_ names {target}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{where}._target_ names {target}, which is not a dataclass")
    return found


def _merge(cls: type, values: Any, where: str) -> Any:
    prefix = f"{where}." if where else ""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except ConfigKeyError as error:
        names = [item.name for item in dataclasses.fields(cls)]
        raise ConfigError(f"unknown key {prefix}{error.full_key}{suggest(str(error.key), names)}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{prefix}{key}: {reason}") from error


def digest(value: object, length: int = 8) -> str:
    """The first hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def _identity(cfg: Any, without: tuple[str, ...]) -> dict:
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in without])
    identity: dict = OmegaConf.to_container(plain, resolve=True)  # type: ignore[assignment]
    if identity.get("train"):
        for key in ("save_minutes", "keep"):  # when something is written changes no result
            identity["train"].pop(key, None)
    if (cfg.get("hardware") or {}).get("quantization", "none") != "none":  # alone of hardware it is a coarser model
        identity["quantization"] = str(cfg.hardware.quantization)
    for place, key in ((identity, "data_dir"), (identity.get("model") or {}, "path")):
        if place.get(key):
            place[key] = os.path.abspath(os.path.expanduser(place[key]))
    return _numbers(identity)


def _numbers(node: Any) -> Any:
    """1 and 1.0 are the same setting."""
    if isinstance(node, dict):
        return {key: _numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_numbers(value) for value in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


def signature(cfg: Any) -> str:
    """Identity of an experiment up to its seed: the hash of every knob that can change its result."""
    return digest(_identity(cfg, NOT_IDENTITY))


def setting(cfg: Any) -> str:
    """Identity of what methods are compared on: the signature without method and replay."""
    return digest(_identity(cfg, (*NOT_IDENTITY, "method", "replay")))


def run_name(root: Any) -> str:
    """`benchmark/method/sSEED-SIGNATURE`: the run directory is a function of the configuration."""
    name = f"{root.benchmark.name}/{root.method.name}/s{root.seed}-{signature(root)}"
    return f".dry/{name}" if root.dry_run else name


def register_resolvers() -> None:
    """Makes ${run_name:} known to OmegaConf; safe to call twice."""
    OmegaConf.register_new_resolver("run_name", lambda _root_: run_name(_root_), replace=True)


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose, so that no stream of random numbers depends on how much another drew."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") >> 1
