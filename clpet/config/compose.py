"""The folders of configuration files, and their composition with Hydra. Imports no torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.config.overrides import quote
from clpet.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# All config groups, in the order in which help and lists show them.
CONFIG_GROUPS = ("method", "model", "benchmark", "objective", "hardware", "peft", "replay", "tracking", "experiment",
                 "debug")  # fmt: skip


def conf_dir() -> Path:
    """The folder of the shipped configs: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def plugin_dirs() -> list[Path]:
    """The folders given with --config-dir; `_target_` may name classes in their Python files.

    They are in an environment variable, so that the processes that a run starts use them too.
    """
    return [Path(folder) for folder in os.environ.get("CLPET_CONFIG_DIR", "").split(os.pathsep) if folder]


def add_plugin_dir(folder: str) -> None:
    """Sets the --config-dir folder of this process and its children. Raises ConfigError if it is not a folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is not a folder")
    os.environ["CLPET_CONFIG_DIR"] = str(Path(folder).resolve())


def compose_config(overrides: list[str], with_hydra: bool = False) -> "DictConfig":
    """The configuration (a DictConfig) that overrides give, with the user's --config-dir on the search path.

    With `with_hydra` also Hydra's own options. Works inside a program that uses Hydra itself, too.
    """
    from hydra import compose, initialize_config_dir  # Hydra and OmegaConf stay out of `clpet --help`
    from hydra.core.global_hydra import GlobalHydra

    from clpet.config.identity import register_resolvers

    register_resolvers()
    paths = ",".join(quote(f"file://{folder}") for folder in plugin_dirs())
    words = [*overrides, *([f"hydra.searchpath=[{paths}]"] if paths else [])]
    previous = GlobalHydra.instance().hydra  # of the program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", words, return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = previous
