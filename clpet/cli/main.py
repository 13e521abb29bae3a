"""The command line: subcommands, shorthands, completion, and one line for every mistake. Imports no torch."""

import os
import sys
from collections.abc import Callable

from clpet import __version__
from clpet.cli import runs
from clpet.cli.completion import complete
from clpet.cli.data import data
from clpet.cli.error_messages import format_error, print_error
from clpet.cli.options import COMMANDS, list_options
from clpet.cli.train import train
from clpet.errors import ConfigError, suggest
from clpet.runtime.signals import Interrupted


def main() -> None:
    """Entry point of the `clpet` command."""
    use_utf8()
    sys.exit(main_with_errors(sys.argv[1:]))


def use_utf8() -> None:
    """Starts Python once more in its UTF-8 mode where file names would be ASCII: LC_ALL=C with that mode turned off.

    Paths, logs and tables hold names from data, which such a Python can neither hash nor print.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "clpet", *sys.argv[1:]])


def main_with_errors(argv: list[str]) -> int:
    """Runs a command; every expected mistake becomes one line on stderr and an exit code."""
    try:
        return dispatch(argv)
    except KeyboardInterrupt:
        return print_error("stopped; the same command goes on from what is saved", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Interrupted) as error:
        return print_error(*format_error(error))


def dispatch(argv: list[str]) -> int:
    """Picks the subcommand; `clpet -sc ...` is shell completion."""
    if "COMP_LINE" in os.environ and "-sc" in argv:
        return complete(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] == "-sc":
        return train(argv)
    handlers: dict[str, Callable[[list[str]], int]] = {
        "train": train, "runs": runs.runs, "show": runs.show, "eval": runs.evaluate,
        "export": runs.export, "list": list_options, "data": data, "sweep": sweep,
    }  # fmt: skip
    if argv[0] not in handlers:
        raise ConfigError(f"unknown command {argv[0]}{suggest(argv[0], COMMANDS)}")
    return handlers[argv[0]](argv[1:])


def sweep(argv: list[str]) -> int:
    """`clpet sweep key=value,value ...`: what scripts/slurm_array.sh calls before it submits."""
    from clpet.cli import slurm_array  # keeps OmegaConf out of `clpet --help`

    return slurm_array.sweep(argv)


def usage() -> str:
    """The top-level help."""
    lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "clpet: continual learning of language models, one command per experiment",
            "",
            "clpet COMMAND ...",
            *lines,
            "",
            "Start with:  clpet train                 the default run, a few minutes on a laptop, no downloads",
            "             clpet train --help          groups, flags and examples",
            "             clpet list methods",
            'Completion:  eval "$(clpet -sc install=bash)"',
        ]
    )
