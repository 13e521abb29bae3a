"""Where configs are found, and how Hydra composes them."""

import os
from pathlib import Path
from typing import Any

from clpet.config.overrides import quote
from clpet.errors import ConfigError


def conf_dir() -> Path:
    """The folder of the shipped configs: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def plugin_dirs() -> list[Path]:
    """The folders given with --config-dir: their Python files may be named by `_target_`."""
    return [Path(folder) for folder in os.environ.get("CLPET_CONFIG_DIR", "").split(os.pathsep) if folder]


def add_plugin_dir(folder: str) -> None:
    """Makes a --config-dir known to `find_class`. Raises ConfigError where it is no folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is not a folder")
    os.environ["CLPET_CONFIG_DIR"] = str(Path(folder).resolve())


CONFIG_GROUPS = ("method", "model", "benchmark", "hardware", "peft", "replay", "tracking", "experiment", "debug")


def compose_config(words: list[str]) -> Any:
    """The configuration that overrides give, the user's --config-dir included."""
    from hydra import compose, initialize_config_dir

    from clpet.config.identity import register_resolvers  # like Hydra, OmegaConf stays out of `clpet --help`

    register_resolvers()
    paths = ",".join(quote(f"file://{folder}") for folder in plugin_dirs())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*words, *([f"hydra.searchpath=[{paths}]"] if paths else [])])
