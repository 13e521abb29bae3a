"""The `clpet` command: its subcommands, help, and one line for every expected error. Imports no torch at the top."""

import os
import sys
from collections.abc import Callable

from clpet import __version__
from clpet.cli import runs
from clpet.cli.check import check
from clpet.cli.completion import complete
from clpet.cli.data import data
from clpet.cli.error_messages import format_error, print_error
from clpet.cli.init import init
from clpet.cli.options import COMMANDS, list_options
from clpet.cli.predict import predict
from clpet.cli.report import report
from clpet.cli.reproduce import reproduce
from clpet.cli.train import train
from clpet.errors import ConfigError, suggest
from clpet.runtime.launchers import is_spare
from clpet.runtime.signals import Interrupted


def main() -> None:
    """Entry point of the `clpet` command."""
    use_utf8()
    sys.exit(main_with_errors(sys.argv[1:]))


def use_utf8() -> None:
    """Restarts Python in UTF-8 mode if file names would be ASCII, as with LC_ALL=C PYTHONUTF8=0.

    Paths, logs and tables contain names from data, which an ASCII Python can neither hash nor print.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "clpet", *sys.argv[1:]])


def main_with_errors(argv: list[str]) -> int:
    """Runs a command; an expected error is one line on stderr. Returns the exit code."""
    try:
        return dispatch(argv)
    except KeyboardInterrupt:  # the second Ctrl-C, or one outside a run
        return print_error("stopped", 130)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; Python must not flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Interrupted) as error:
        return print_error(*format_error(error))


def dispatch(argv: list[str]) -> int:
    """Calls the subcommand; `clpet -sc ...` is shell completion."""
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
        "train": train, "runs": runs.runs, "report": report, "show": runs.show, "eval": runs.evaluate,
        "export": runs.export, "list": list_options, "data": data, "init": init, "predict": predict, "sweep": sweep,
        "check": check, "reproduce": reproduce,
    }  # fmt: skip
    if argv[0] not in handlers:
        raise ConfigError(f"unknown command {argv[0]!r}{suggest(argv[0], COMMANDS)}")
    if argv[0] != "train" and is_spare():
        return 0
    return handlers[argv[0]](argv[1:])


def sweep(argv: list[str]) -> int:
    """`clpet sweep key=value,value ...`: called by scripts/slurm_array.sh before it submits."""
    from clpet.cli import slurm_array  # keeps OmegaConf out of `clpet --help`

    return slurm_array.sweep(argv)


def usage() -> str:
    """The top-level help."""
    lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "clpet: continual learning of language models, one command per experiment",
            "",
            "clpet COMMAND ...          clpet COMMAND --help describes a command",
            *lines,
            "",
            "Start with:  clpet train                 the default run: about a minute on a laptop, no downloads",
            "             clpet train --help          groups, flags and examples",
            "             clpet list                  the methods, models and benchmarks to choose from",
            'Completion:  eval "$(clpet -sc install=bash)"',
        ]
    )
