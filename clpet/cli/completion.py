"""Shell completion of a command line. Imports no torch."""

import os
from pathlib import Path

from clpet.cli.options import COMMANDS, options
from clpet.cli.train import train
from clpet.config.compose import CONFIG_GROUPS

RUNS = "outputs/*/*/s*-*"  # run directories that completion offers
OF_A_RUN = ("show", "check", "eval", "export", "predict")  # commands whose first word is a run directory
OF_A_FOLDER = ("runs", "report")  # commands that compare the runs of a folder


def complete(argv: list[str]) -> int:
    """Prints the completions of $COMP_LINE: subcommands, their arguments, or Hydra's keys of `clpet train`."""
    words = os.environ["COMP_LINE"].split(" ")
    if len(words) > 2 and words[1] == "train":
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])  # Hydra does not expect a subcommand
        return train(argv)
    *before, last = words
    head, comma, item = last.rpartition(",")  # of a list such as method,seed only the last item is completed
    offered = [head + comma + name for name in candidates(before[1:]) if name.startswith(item)]
    print(" ".join(offered))
    return 0


def candidates(before: list[str]) -> list[str]:
    """What may follow the words `before`, of which the first is the subcommand."""
    if not before:
        return list(COMMANDS)
    command, *arguments = before
    if command in OF_A_FOLDER and arguments:
        return _values_of_flag(arguments[-1])
    if command == "list":
        return _listed(arguments)
    if arguments:
        return []
    if command == "data":
        return list(options("benchmark"))
    return [str(path) for path in sorted(Path().glob(RUNS))] if command in OF_A_RUN else []


def _values_of_flag(flag: str) -> list[str]:
    if flag == "--metrics":
        from clpet.metrics.perplexity_transfer import FORMULAS
        from clpet.metrics.transfer_matrix import CONVENTIONS

        return [*CONVENTIONS, *FORMULAS]
    return [*CONFIG_GROUPS, *_common_keys()] if flag == "--compare" else []


def _common_keys() -> list[str]:
    """Keys of `train` and `evaluation`, by which runs are often compared."""
    from clpet.config.compose import compose_config

    cfg = compose_config([])
    return ["seed", *(f"{group}.{key}" for group in ("train", "evaluation") for key in cfg[group])]


def _listed(arguments: list[str]) -> list[str]:
    if not arguments:
        return [group if group in ("hardware", "debug") else f"{group}s" for group in CONFIG_GROUPS]
    group = arguments[0] if arguments[0] in CONFIG_GROUPS else arguments[0].removesuffix("s")
    return list(options(group)) if group in CONFIG_GROUPS and len(arguments) == 1 else []
