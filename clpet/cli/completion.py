"""Shell completion of a command line."""

import os
from pathlib import Path

from clpet.cli.options import COMMANDS
from clpet.cli.train import train

RUNS = "outputs/*/*/s*-*"  # run directories that completion offers


def complete(argv: list[str]) -> int:
    """Prints the completions of $COMP_LINE: subcommands, run directories, or Hydra's keys of `clpet train`."""
    words = os.environ["COMP_LINE"].split(" ")
    if len(words) <= 2:
        print(" ".join(name for name in COMMANDS if name.startswith(words[-1])))
        return 0
    if words[1] in ("show", "eval", "export") and len(words) == 3:
        print(" ".join(path for path in map(str, sorted(Path().glob(RUNS))) if path.startswith(words[-1])))
    if words[1] != "train":
        return 0
    os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])  # Hydra does not expect a subcommand
    return train(argv)
