"""The words and keyword arguments of a call, as a configuration: what `clpet train` composes from its command line."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from clpet.cli.error_messages import disk_message, hydra_message
from clpet.cli.options import check_group_options
from clpet.config.compose import compose_config
from clpet.config.overrides import PATH_KEYS, SHORT_KEYS, expand_override, needs_no_quotes, quote
from clpet.errors import ClpetError, ConfigError, HostError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What an option can be set to: None is null, a mapping or a sequence may hold further values.
Value: TypeAlias = "str | int | float | bool | os.PathLike[str] | Sequence[Value] | Mapping[str, Value] | None"


def overrides(words: Sequence[str], options: Mapping[str, Value]) -> list[str]:
    """The overrides for Hydra of words such as "train.epochs=2" and of keyword arguments such as seed=1.

    Raises ConfigError for flags and for words other than KEY=VALUE.
    """
    for word in words:
        if not isinstance(word, str) or word.startswith("-") or "=" not in word.lstrip("~"):
            raise ConfigError(f"{word!r} is not KEY=VALUE; flags such as -m are for the command line")
        if word.lstrip("+~").startswith("hydra"):
            raise ConfigError(f"{word}: Hydra's own options are for the command line")
    named = [f"{key}={literal(value)}" for key, value in map(_in_full, options.items())]
    result = [*map(expand_override, words), *named]
    if any(word.lstrip("+").startswith("extend=") for word in result):
        from clpet.runs.extension_words import with_settings_of_run

        result = with_settings_of_run(result)
    check_group_options(result)
    return result


def _in_full(option: tuple[str, Value]) -> tuple[str, Value]:
    """A short key in full, and the text of a path as a path."""
    key, value = SHORT_KEYS.get(option[0], option[0]), option[1]
    return key, Path(value) if key in PATH_KEYS and isinstance(value, str | os.PathLike) else value


def literal(value: Value) -> str:
    """A value in the grammar of Hydra's overrides. A text is quoted where Hydra would read it as something else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        text = value if isinstance(value, str) else str(Path(value).expanduser())
        return text if needs_no_quotes(text) and text.lower() != "null" else quote(text)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    raise ConfigError(f"{value!r} cannot be the value of an option: use text, numbers, True, False, None or lists")


def compose(words: Sequence[str]) -> "DictConfig":
    """The configuration of one run. Raises ConfigError."""
    from omegaconf import open_dict

    with as_clpet_errors():
        cfg = compose_config(list(words), with_hydra=True)
        if "MULTIRUN" in str(cfg.hydra.mode):
            name = cfg.hardware.name
            raise ConfigError(f"hardware={name} submits jobs, which the command line does: clpet train hardware={name}")
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg


def run_folder(cfg: "DictConfig") -> Path:
    """The run directory that `clpet train` uses for a configuration."""
    from clpet.config.identity import run_name

    return Path(cfg.output_dir).absolute() / run_name(cfg)


@contextmanager
def as_clpet_errors() -> Iterator[None]:
    """Raises the errors of Hydra and of a full disk as ClpetError; errors of other kinds pass unchanged."""
    try:
        yield
    except ClpetError:
        raise
    except Exception as error:
        if message := disk_message(error):
            raise HostError(message) from error
        if message := hydra_message(error):
            sweeps = ": to sweep over the values, add -m"
            raise ConfigError(message.replace(sweeps, ": call clpet.train once for each value")) from error
        raise
