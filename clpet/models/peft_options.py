"""The options of the group `peft`: full fine-tuning, block expansion, and the methods of peft."""

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import peft
from torch import nn

from clpet.config.schema import Node, require
from clpet.errors import ConfigError, first_line, suggest
from clpet.models.architectures import all_linear, norm_layers
from clpet.models.backbone import Backbone, Representation
from clpet.models.block_expansion import expand
from clpet.models.peft_methods import METHODS, REFUSED, REFUSED_FIELDS, PeftTraits
from clpet.records import Json

if TYPE_CHECKING:
    Targets = str | list[str] | None
else:
    Targets = Any  # OmegaConf accepts no union of a scalar with a list; `__post_init__` checks the values

ALL_LINEAR = "all-linear"
ConfigClass: TypeAlias = type[peft.PeftConfig]
# The config fields of all methods that say where a config comes from, not what it is.
COMMON_FIELDS = frozenset(item.name for item in dataclasses.fields(peft.PeftConfig))


@dataclass
class FullFineTuning:
    """peft=none, full fine-tuning: every weight of the backbone is trained. The base class of all other options."""

    name: str = "none"

    @property
    def traits(self) -> PeftTraits:
        """What this option can do."""
        return PeftTraits(
            saves_model=True, full=True, several=False, keeps_backbone=False, transposed=True, shards=True
        )

    def peft_config(self, backbone: Backbone, model: nn.Module) -> peft.PeftConfig | None:
        """peft's configuration for a network; None if weights of the backbone itself are trained."""
        return None

    def trained_module(self, model: nn.Module) -> nn.Module:
        """The part of the backbone that is trained if there is no peft config."""
        return model


@dataclass
class Blocks(FullFineTuning):
    """Block expansion: a copy after every `every`-th block; only the copies are trained (arXiv 2401.02415)."""

    name: str = "blocks"
    every: int = 4

    @property
    def traits(self) -> PeftTraits:
        return dataclasses.replace(super().traits, adds_blocks=True)

    def __post_init__(self) -> None:
        require(self.every >= 1, "peft.every", self.every, "at least 1")

    def trained_module(self, model: nn.Module) -> nn.Module:
        return nn.ModuleList(expand(model, self.every))


@dataclass
class Frozen(FullFineTuning):
    """peft=frozen: the backbone is not trained; the method adds and trains vectors of its own."""

    name: str = "frozen"

    @property
    def traits(self) -> PeftTraits:
        return PeftTraits(trains=False, mergeable=False, transposed=True, nf4=True, shards=True)

    def peft_config(self, backbone: Backbone, model: nn.Module) -> peft.PeftConfig:
        return peft.PeftConfig(task_type="FEATURE_EXTRACTION")


@dataclass
class PeftOption(FullFineTuning):
    """Base of the methods of peft.

    Options of the YAML or the command line that the class does not have are fields of peft's config. They are
    gathered in `fields` and checked against the types of that config, and then by peft itself.
    """

    fields: Node = field(default_factory=dict)

    further_options: ClassVar[str] = "fields"

    def __post_init__(self) -> None:
        check_fields(self.config_class, self.fields, self.own_fields())
        self._config(["any"])  # so that peft's own checks come before any work

    @property
    def method(self) -> str:
        """The method's name in peft.PeftType."""
        raise NotImplementedError

    @property
    def config_class(self) -> ConfigClass:
        """peft's config class of this method."""
        mapping = cast(Mapping[str, ConfigClass], peft.PEFT_TYPE_TO_CONFIG_MAPPING)
        return mapping[peft.PeftType(self.method)]

    @property
    def traits(self) -> PeftTraits:
        return METHODS[self.method]

    def own_fields(self) -> dict[str, object]:
        """Fields of peft's config that are options of the class under other names."""
        return {}

    def target_modules(self, backbone: Backbone, model: nn.Module) -> list[str] | None:
        """The names of the layers to adapt, matched at the end of a module's name; None: peft knows them."""
        return None

    def peft_config(self, backbone: Backbone, model: nn.Module) -> peft.PeftConfig:
        return self._config(self.target_modules(backbone, model))

    def _config(self, targets: list[str] | None) -> peft.PeftConfig:
        """peft's config. Raises ConfigError with peft's own message for values that do not fit together."""
        values = {**cast(dict[str, object], self.fields), **self.own_fields(), "task_type": "FEATURE_EXTRACTION"}
        if "target_modules" in field_types(self.config_class):
            values["target_modules"] = targets
        try:
            return cast(Callable[..., peft.PeftConfig], self.config_class)(**values)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"peft={self.name}: {first_line(error)}") from error


@dataclass
class Targeted(PeftOption):
    """Base of the methods of peft that adapt some of the network's layers."""

    targets: Targets = None

    def __post_init__(self) -> None:
        targets = self.targets
        named = isinstance(targets, list) and bool(targets) and all(isinstance(target, str) for target in targets)
        valid = targets is None or targets == ALL_LINEAR or named
        require(valid, "peft.targets", targets, f"a list of module names, {ALL_LINEAR}, or null")
        super().__post_init__()

    def target_modules(self, backbone: Backbone, model: nn.Module) -> list[str] | None:
        targets = self.targets
        if targets in (ALL_LINEAR, [ALL_LINEAR]):
            return all_linear(model, pooled=backbone.representation is Representation.pooled)
        if targets is None and self.traits.normalises:
            return norm_layers(model)
        if targets is None and self.traits.embeds:
            return None  # peft chooses the input embedding
        return list(targets or backbone.targets)


@dataclass
class Peft(Targeted):
    """A method of peft, named by `type` as in peft.PeftType."""

    type: str = ""

    def __post_init__(self) -> None:
        if self.type not in METHODS:
            reason = REFUSED.get(self.type.lower())
            unknown = f"peft.type must be a method of peft, not {self.type}{suggest(self.type, METHODS)}"
            raise ConfigError(f"peft.type={self.type} is not supported: {reason}" if reason else unknown)
        super().__post_init__()
        unused = self.traits.prepends and self.targets is not None
        require(not unused, "peft.targets", self.targets, f"null with peft={self.name}, which adapts no layer")
        if self.traits.embeds:
            indices = self.fields.get("token_indices")
            require(bool(indices), "peft.token_indices", indices, "a list of token ids, such as [1,2,3]")

    @property
    def method(self) -> str:
        return self.type


@dataclass
class Lora(Targeted):
    """LoRA: h = W x + (alpha / r) B A x, initialised with A Kaiming-uniform and B = 0 (Hu et al., 2021).

    The variants DoRA, rsLoRA, PiSSA and OLoRA are fields of peft's config.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.r >= 1, "peft.r", self.r, "at least 1")
        require(0 <= self.dropout < 1, "peft.dropout", self.dropout, "in [0, 1)")
        if self._init not in (True, False, *INITS):
            reason = REFUSED.get(str(self._init), f"use true, false, {', '.join(INITS)}")
            raise ConfigError(f"peft.init_lora_weights={self._init} is not supported: {reason}")
        super().__post_init__()

    @property
    def method(self) -> str:
        return "LORA"

    @property
    def _init(self) -> str | bool:
        return cast(str | bool, self.fields.get("init_lora_weights", True))

    @property
    def traits(self) -> PeftTraits:
        """PiSSA and OLoRA subtract what the adapter starts with from the backbone's weights."""
        plain = METHODS["LORA"]
        if self.fields.get("use_dora") or self.fields.get("lora_bias"):
            plain = dataclasses.replace(plain, lora_factors=False, shards=False, nf4=False)
        if self._init not in ("pissa", "olora"):
            return plain
        changed = dataclasses.replace(plain, several=False, keeps_backbone=False, shards=False, nf4=False)
        return dataclasses.replace(changed, transposed=self._init == "pissa")

    def own_fields(self) -> dict[str, object]:
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout}


INITS = ("gaussian", "orthogonal", "pissa", "olora")


@dataclass
class Ia3(Targeted):
    """IA3: learned rescaling of the outputs of the target layers (Liu et al., 2022)."""

    feedforward: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return "IA3"

    def target_modules(self, backbone: Backbone, model: nn.Module) -> list[str]:
        return [*(super().target_modules(backbone, model) or []), *self.feedforward]

    def own_fields(self) -> dict[str, object]:
        return {"feedforward_modules": list(self.feedforward)}


@dataclass
class Osf(Targeted):
    """OSF: trains only the directions of small singular values, orthogonal to the large ones (Nayak et al., 2025)."""

    effective_rank: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.effective_rank < 1, "peft.effective_rank", self.effective_rank, "between 0 and 1")
        super().__post_init__()

    @property
    def method(self) -> str:
        return "OSF"

    def own_fields(self) -> dict[str, object]:
        return {"effective_rank": self.effective_rank}


@dataclass
class Prompt(PeftOption):
    """Virtual tokens before the text (Lester et al., 2021) or, as prefix, before the keys and values of all layers."""

    tokens: int = 20
    every_layer: bool = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "peft.tokens", self.tokens, "at least 1")
        super().__post_init__()

    @property
    def method(self) -> str:
        return "PREFIX_TUNING" if self.every_layer else "PROMPT_TUNING"

    def own_fields(self) -> dict[str, object]:
        return {"num_virtual_tokens": self.tokens}


def check_fields(config: ConfigClass, values: Mapping[str, Json], taken: Collection[str]) -> None:
    """Raises ConfigError for a name that is not a field of peft's config, or a value of another type.

    `taken` are fields that options with other names set.
    """
    hints = field_types(config)
    for key, value in values.items():
        if key in taken:
            raise ConfigError(f"peft.{key} has a name of its own here: {', '.join(taken)} are set by other options")
        if key in REFUSED_FIELDS and value not in (None, "none"):
            raise ConfigError(f"peft.{key} is not supported: it {REFUSED_FIELDS[key].removeprefix('it ')}")
        if key not in hints:
            raise ConfigError(f"unknown key peft.{key}{suggest(key, set(hints) - set(REFUSED_FIELDS))}")
        if not fits(value, hints[key]):
            raise ConfigError(f"peft.{key} must be {type_name(hints[key])}, not {value}")


def field_types(config: ConfigClass) -> dict[str, object]:
    """{field of peft's config: its type}, without those that all methods share."""
    hints = typing.get_type_hints(config)
    return {item.name: hints[item.name] for item in dataclasses.fields(config) if item.name not in COMMON_FIELDS}


def fits(value: Json, hint: object) -> bool:
    """Whether a value of a YAML has the type of an annotation; classes of peft fit nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if hint is dict or origin is dict:
        return isinstance(value, dict) and (not arguments or all(fits(item, arguments[1]) for item in value.values()))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return hint in (int, str, bool, types.NoneType) and type(value) is hint


def type_name(hint: object) -> str:
    """An annotation in words: "an integer or null"."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(str(member.value) for member in hint)
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    lists = {list: "a list", dict: "a mapping"}
    return words.get(hint, lists.get(typing.get_origin(hint) or hint, "null"))  # type: ignore[arg-type,call-overload,no-any-return]
