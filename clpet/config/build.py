"""Builds objects from config nodes: the only place where a configuration decides which code runs."""

import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from clpet.config.compose import plugin_dirs
from clpet.config.renamed import renamed_message
from clpet.config.schema import Config
from clpet.errors import ConfigError, suggest
from clpet.records import Json

T = TypeVar("T")

# Class paths of earlier versions and where the classes are today: run directories of those versions and YAML files
# written for them still open.
MOVED_CLASSES = {
    "clpet.adapters.Adapter": "clpet.models.peft_options.FullFineTuning",
    "clpet.adapters.Blocks": "clpet.models.peft_options.Blocks",
    "clpet.adapters.Frozen": "clpet.models.peft_options.Frozen",
    "clpet.adapters.Ia3": "clpet.models.peft_options.Ia3",
    "clpet.adapters.Lora": "clpet.models.peft_options.Lora",
    "clpet.adapters.Osf": "clpet.models.peft_options.Osf",
    "clpet.adapters.Prompt": "clpet.models.peft_options.Prompt",
    "clpet.backbones.Backbone": "clpet.models.backbone.Backbone",
    "clpet.domains.TextDomains": "clpet.data.sources.text_domains.TextDomains",
    "clpet.entities.Relations": "clpet.data.sources.entities.Relations",
    "clpet.entities.Typing": "clpet.data.sources.entities.Typing",
    "clpet.hardware.Hardware": "clpet.runtime.hardware.Hardware",
    "clpet.m2d2.M2D2": "clpet.data.sources.m2d2.M2D2",
    "clpet.memory.AllReplay": "clpet.replay.base.AllReplay",
    "clpet.memory.DynamicReplay": "clpet.replay.sampled.DynamicReplay",
    "clpet.memory.FixedReplay": "clpet.replay.exemplar.FixedReplay",
    "clpet.memory.NoReplay": "clpet.replay.base.NoReplay",
    "clpet.memory.ReservoirReplay": "clpet.replay.sampled.ReservoirReplay",
    "clpet.memory.ShareReplay": "clpet.replay.exemplar.ShareReplay",
    "clpet.models.adapters.Blocks": "clpet.models.peft_options.Blocks",
    "clpet.models.adapters.Frozen": "clpet.models.peft_options.Frozen",
    "clpet.models.adapters.FullFineTuning": "clpet.models.peft_options.FullFineTuning",
    "clpet.models.adapters.Ia3": "clpet.models.peft_options.Ia3",
    "clpet.models.adapters.Lora": "clpet.models.peft_options.Lora",
    "clpet.models.adapters.Osf": "clpet.models.peft_options.Osf",
    "clpet.models.adapters.Prompt": "clpet.models.peft_options.Prompt",
    "clpet.python_domains.PythonDomains": "clpet.data.sources.python_domains.PythonDomains",
    "clpet.rates.RateReplay": "clpet.replay.fixed_fraction.FixedFractionReplay",
    "clpet.sources.Folders": "clpet.data.sources.Folders",
    "clpet.sources.PythonStdlib": "clpet.data.sources.PythonStdlib",
    "clpet.sources.Table": "clpet.data.sources.Table",
    "clpet.tracking.Tracking": "clpet.runs.tracking_options.Tracking",
}


# {OmegaConf's message about a value of a wrong type: what clpet prints after the key}
WRONG_TYPES = {
    "Value '(.*)' of type '.*' could not be converted to Integer": " must be an integer, not {}",
    "Value '(.*)' of type '.*' could not be converted to Float": " must be a number, not {}",
    "Value '(.*)' is not a valid bool": " must be true or false, not {}",
    r"Invalid value '(.*)', expected one of \[(.*)\]": " must be one of {1}, not {0}",
    "is not a ListConfig, list or tuple": " must be a list, such as [a,b]",
    "Incompatible value 'None' for field of type": " must have a value, not null",
}


def parse_config(cfg: DictConfig) -> Config:
    """The composed config with all top-level options checked. Raises ConfigError for an unknown key or wrong type."""
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return _merge(Config, OmegaConf.to_container(plain, resolve=True), "")


def build(node: Mapping[str, Json], where: str, **runtime: object) -> Any:
    """An instance of the dataclass in a node's `_target_`, with the node's other keys as checked fields.

    The class must belong to clpet or to a --config-dir folder. `where` is the node's key in error messages; `runtime`
    sets attributes that are not options. Raises ConfigError.
    """
    cls = find_class(str(node["_target_"]), where)
    instance: object = _merge(cls, _gathered(cls, node), where)
    for key, value in runtime.items():
        setattr(instance, key, value)
    return instance


def _gathered(cls: type, node: Mapping[str, Json]) -> dict[str, Json]:
    """The options of a node. A class with `further_options` gets those that it does not declare in one mapping."""
    values = {key: value for key, value in node.items() if key != "_target_"}
    further: str = getattr(cls, "further_options", "")
    if not further:
        return values
    declared = {item.name for item in dataclasses.fields(cls)}
    others = {key: values.pop(key) for key in [*values] if key not in declared}
    return {**values, further: others}


def find_class(target: str, where: str) -> type:
    """The dataclass in a `_target_`, of clpet or of a --config-dir folder. Raises ConfigError."""
    target = MOVED_CLASSES.get(target, target)
    module_name, _, class_name = target.rpartition(".")
    for folder in plugin_dirs():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # at the end: a plugin must not replace an installed package
    try:
        if not _is_allowed(module_name.partition(".")[0]):
            raise ConfigError(
                f"{where}._target_ names {target}, which is neither part of clpet nor in a --config-dir folder"
            )
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}._target_ names {target}, which cannot be imported: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{where}._target_ names {target}, which is not a dataclass")
    return cls


def option_names(target: str, where: str) -> list[str]:
    """The options of the class in a `_target_`. Raises ConfigError as `find_class` does."""
    return [item.name for item in dataclasses.fields(find_class(target, where))]


def _is_allowed(package: str) -> bool:
    """Whether a top-level package or module is clpet, or its file is in a --config-dir folder; imports nothing."""
    if package == "clpet":
        return True
    spec = importlib.util.find_spec(package) if package else None
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    return origin is not None and any(origin.is_relative_to(folder.resolve()) for folder in plugin_dirs())


def _merge(cls: type[T], values: object, where: str) -> T:
    """An instance of a dataclass with these values, checked against its annotations. Raises ConfigError."""
    prefix = f"{where}." if where else ""
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))
    except ConfigKeyError as error:
        key = f"{prefix}{error.full_key}"
        names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        message = renamed_message(key) or f"unknown key {key}{suggest(str(error.key), names)}"
        raise ConfigError(message) from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{prefix}{key}{_reason(str(error).splitlines()[0])}") from error


def _reason(text: str) -> str:
    """What follows the key in the message about a value of a wrong type, from OmegaConf's message."""
    for pattern, message in WRONG_TYPES.items():
        if match := re.search(pattern, text):
            return message.format(*match.groups())
    return f": {text}"
