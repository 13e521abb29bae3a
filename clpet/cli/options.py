"""Config groups and their options, and the words of a command line."""

import argparse
import os
import re
from itertools import pairwise
from pathlib import Path

from clpet.config.compose import CONFIG_GROUPS, add_plugin_dir, conf_dir, plugin_dirs
from clpet.config.overrides import expand_override
from clpet.errors import ConfigError, suggest
from clpet.escape import inline, printable

COMMANDS = {
    "train": "learn a benchmark task by task and write its transfer matrix (also resumes, and sweeps with -m)",
    "runs": "list what is in the output folder, or compare groups of runs",
    "show": "print one run: figures, matrices, costs",
    "eval": "test a run's weights once more, or on tasks of lm-evaluation-harness",
    "export": "write what a run trained for use without clpet: adapters, or merged weights",
    "list": "what there is: methods, models, benchmarks, hardware, ...",
    "data": "look at a benchmark's data: counts, balance, lengths, repeats, overlaps",
}
HYDRA_FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i", "--config-name",
                          "-cn", "--config-path", "-cp", "--experimental-rerun", "-sc")  # fmt: skip
HYDRA_FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "--resolve", "--version", "-r", "--run")


def normalize_argv(argv: list[str]) -> list[str]:
    """Flags first, wherever they stood; shorthands spelt out; the --config-dir made known to `build`."""
    flags, overrides = split_flags(argv)
    return [*flags, *overrides]


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """(Hydra's flags with their values, overrides) of a command line."""
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if word in HYDRA_FLAGS_WITH_VALUE:
            value = next(words, "")
            if not value:
                raise ConfigError(f"{word} needs a value")
            flags += [word, value]
        elif word.startswith("-"):
            name, equals, inline = word.partition("=")
            if name not in (*HYDRA_FLAGS, *HYDRA_FLAGS_WITH_VALUE):
                raise ConfigError(f"unknown flag {name}{suggest(name, (*HYDRA_FLAGS, *HYDRA_FLAGS_WITH_VALUE))}")
            flags.append(f"{name}{equals}{os.path.expanduser(inline)}")
        else:
            overrides.append(word)
    for flag, value in pairwise([*flags, ""]):
        name, _, given = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            add_plugin_dir(given or value)
    return flags, [expand_override(word) for word in overrides]


def check_group_options(arguments: list[str]) -> None:
    """Raises ConfigError with a suggestion for a group option that does not exist, before Hydra starts."""
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key in CONFIG_GROUPS and re.fullmatch(r"[\w,./-]+", value):
            known = options(key)
            for choice in value.split(","):
                if choice not in known and not (choice == "null" and key in ("experiment", "debug")):
                    raise ConfigError(f"{key}={choice}: there is no such {key}{suggest(choice, known)}")


def options(group: str) -> dict[str, Path]:
    """{option: its YAML} of a config group, the user's own --config-dir included."""
    found: dict[str, Path] = {}
    for folder in (conf_dir(), *plugin_dirs()):
        for path in sorted((folder / group).glob("**/*.yaml")):
            name = path.relative_to(folder / group).with_suffix("")
            if "base" not in name.parts[:-1]:
                found[name.as_posix()] = path
    return found


def list_options(argv: list[str]) -> int:
    """`clpet list methods` prints each option's first comment; `clpet list method NAME` prints the YAML."""
    parser = argparse.ArgumentParser("clpet list", description="What there is to choose from.")
    parser.add_argument(
        "group", nargs="?", help="methods, models, benchmarks, hardware, pefts, replays, experiments, ..."
    )
    parser.add_argument("name", nargs="?", help="print this option's YAML")
    parser.add_argument("--config-dir", help="a folder with your own configs")
    arguments = parser.parse_args(argv)
    if arguments.config_dir:
        normalize_argv(["--config-dir", arguments.config_dir])
    indent = "" if arguments.group else "  "
    for named in [arguments.group] if arguments.group else CONFIG_GROUPS:
        group = named if named in CONFIG_GROUPS else named.removesuffix("s")
        if group not in CONFIG_GROUPS:
            raise ConfigError(f"there is no group {named}{suggest(named, CONFIG_GROUPS)}")
        known = options(group)
        if arguments.name:
            if arguments.name not in known:
                raise ConfigError(f"there is no {group} {arguments.name}{suggest(arguments.name, known)}")
            print(printable(known[arguments.name].read_text(), kept="\n\t"), end="")
            return 0
        if not arguments.group:
            print(f"{group}:")
        width = max((len(name) for name in known), default=0)
        for name, path in known.items():
            print(inline(f"{indent}{name:{width}}  {first_comment(path)}"))
    return 0


def first_comment(path: Path) -> str:
    """What an option is: the first comment line of its YAML (after a package line)."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""
