"""The words of a command line, and the config groups with their options. Imports no torch."""

import argparse
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from clpet.config.compose import CONFIG_GROUPS, add_plugin_dir, conf_dir, plugin_dirs
from clpet.config.overrides import expand_override
from clpet.errors import ConfigError, suggest
from clpet.escape import inline, printable
from clpet.models.peft_methods import REFUSED

COMMANDS = {
    "train": "learn a benchmark task by task and write its transfer matrix (also resumes runs, and sweeps with -m)",
    "runs": "list the runs in the output folder, or compare groups of runs",
    "report": "write one HTML file about the runs of a folder: tables, charts, matrices, mistakes",
    "show": "print one run: scores, matrices, costs",
    "check": "exit with 1 if a run forgot more than a limit, one line per task: a gate for scripts",
    "eval": "evaluate the weights of a run again, or on tasks of lm-evaluation-harness",
    "predict": "answer new texts with the model of a run: labels with probabilities, texts, or perplexities",
    "export": "write the trained weights of a run for use without clpet: adapters, or merged weights",
    "reproduce": "make a table of results: equal tuning, all seeds and orders, tests; resumes",
    "list": "list the methods, models, benchmarks, hardware, ... to choose from",
    "data": "describe a benchmark, or a file or folder of your own, and print the command that trains on it",
    "init": "write a benchmark YAML for data of your own, or a method with a test",
}
HYDRA_FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i", "--config-name",
                          "-cn", "--config-path", "-cp", "--experimental-rerun", "-sc")  # fmt: skip
HYDRA_FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "--resolve", "--version", "-r", "--run")


def normalize_argv(argv: list[str]) -> list[str]:
    """The command line as Hydra expects it: flags before overrides, short keys in full, settings of extend=RUN."""
    flags, overrides = split_flags(argv)
    if any(word.lstrip("+").startswith("extend=") for word in overrides):
        from clpet.runs.extension_words import with_settings_of_run

        overrides = with_settings_of_run(overrides)
    return [*flags, *overrides]


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """(Hydra's flags with their values, overrides) of a command line; a --config-dir is added to the plugin folders."""
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
            name, equals, value = word.partition("=")
            if name not in (*HYDRA_FLAGS, *HYDRA_FLAGS_WITH_VALUE):
                raise ConfigError(f"unknown flag {name}{suggest(name, (*HYDRA_FLAGS, *HYDRA_FLAGS_WITH_VALUE))}")
            flags.append(f"{name}{equals}{os.path.expanduser(value)}")
        else:
            overrides.append(word)
    if sum(flag.partition("=")[0] in ("--config-dir", "-cd") for flag in flags) > 1:
        raise ConfigError("--config-dir is given twice: put all YAMLs and classes into one folder")
    for flag, following in pairwise([*flags, ""]):
        name, _, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            add_plugin_dir(value or following)
    return flags, [expand_override(word) for word in overrides]


def check_group_options(arguments: list[str]) -> None:
    """Raises ConfigError with a suggestion for an unknown option of a group; faster than waiting for Hydra."""
    for word in arguments:
        group, equals, value = word.partition("=")
        if equals and group in CONFIG_GROUPS and re.fullmatch(r"[\w,./-]+", value):
            available = options(group)
            for option in value.split(","):
                if option in available or (option == "null" and group in ("experiment", "debug")):
                    continue
                if group == "peft" and option in REFUSED:
                    raise ConfigError(f"peft={option} is not supported: {REFUSED[option]}")
                raise ConfigError(f"unknown {group} {option!r}{suggest(option, available)}")


def options(group: str) -> dict[str, Path]:
    """{option: its YAML} of a config group, including those of the user's --config-dir; base files are left out."""
    paths: dict[str, Path] = {}
    for folder in (conf_dir(), *plugin_dirs()):
        for path in sorted((folder / group).glob("**/*.yaml")):
            name = path.relative_to(folder / group).with_suffix("")
            if "base" not in name.parts[:-1]:
                paths[name.as_posix()] = path
    return paths


def list_options(argv: list[str]) -> int:
    """`clpet list`: an overview of the groups, the options of one group, or the YAML of one option."""
    description = "The groups of options; with GROUP its options; with GROUP NAME the YAML of that option."
    parser = argparse.ArgumentParser("clpet list", description=description)
    parser.add_argument("group", nargs="?", help="methods, models, benchmarks, pefts, experiments, ...")
    parser.add_argument("name", nargs="?", help="an option, or a paper's experiments, such as conpet")
    parser.add_argument("--config-dir", help="a folder with your own YAMLs")
    arguments = parser.parse_args(argv)
    if arguments.config_dir:
        add_plugin_dir(arguments.config_dir)
    if not arguments.group:
        print("\n".join(map(inline, overview())))
        return 0
    group = arguments.group if arguments.group in CONFIG_GROUPS else arguments.group.removesuffix("s")
    if group not in CONFIG_GROUPS:
        raise ConfigError(f"unknown group {arguments.group!r}{suggest(arguments.group, CONFIG_GROUPS)}")
    available = options(group)
    if arguments.name in available:
        print(printable(available[arguments.name].read_text(), allowed="\n\t"), end="")
        return 0
    if arguments.name:
        below = {name: path for name, path in available.items() if name.startswith(f"{arguments.name}/")}
        if not below:
            raise ConfigError(f"unknown {group} {arguments.name!r}{suggest(arguments.name, available)}")
        available = below
    width = max(map(len, available), default=0)
    for name, path in available.items():
        print(inline(f"{name:{width}}  {first_comment(path)}"))
    return 0


def overview() -> list[str]:
    """The lines of `clpet list`: every group, and every paper with experiments, with a count and a few options."""
    rows = [("group", "options", "examples")]
    for group in CONFIG_GROUPS:
        names = list(options(group))
        papers = Counter(name.partition("/")[0] for name in names if "/" in name)
        top_level = [name for name in names if "/" not in name]
        examples = _examples(top_level, 8) if top_level else "settings of published tables, by paper:"
        rows.append((group if group in ("hardware", "debug") else f"{group}s", str(len(names)), examples))
        for paper, count in papers.items():
            of_paper = [name for name in names if name.startswith(f"{paper}/")]
            rows.append((f"  {paper}", str(count), _examples(of_paper, 3)))
    width = max(len(label) for label, _, _ in rows)
    return [
        *(f"{label:{width}}  {count:>7}  {examples}" for label, count, examples in rows),
        "",
        "clpet list GROUP         one line per option, such as clpet list methods",
        "clpet list GROUP NAME    the YAML of an option, such as clpet list method kif",
    ]


def _examples(names: list[str], count: int) -> str:
    """At most `count` of the names, evenly spaced; "..." where names are left out."""
    chosen = [names[index * len(names) // count] for index in range(count)] if len(names) > count else names
    return ", ".join([*chosen, *(["..."] if len(names) > count else [])])


def first_comment(path: Path) -> str:
    """The description of an option: the first comment line of its YAML, except a `@package` line."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""
