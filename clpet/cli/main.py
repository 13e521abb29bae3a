"""The command line: subcommands, shorthands, completion, and one line for every mistake. Imports no torch."""

import argparse
import atexit
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from clpet import __version__
from clpet.cli import runs
from clpet.cli.error_messages import cluster_message, disk_message, hydra_message, plugin_place
from clpet.config.compose import GROUPS, composed
from clpet.config.overrides import expand
from clpet.errors import ClpetError, ConfigError, suggest
from clpet.escape import inline, printable
from clpet.runtime.signals import CODE, Interrupted

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
RUNS = "outputs/*/*/s*-*"  # what completion offers as a run
HYDRA_FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "--resolve", "--version", "-r", "--run")


def main() -> None:
    """Entry point of the `clpet` command."""
    use_utf8()
    sys.exit(guarded(sys.argv[1:]))


def use_utf8() -> None:
    """Starts Python once more in its UTF-8 mode where file names would be ASCII: LC_ALL=C with that mode turned off.

    Paths, logs and tables hold names from data, which such a Python can neither hash nor print.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "clpet", *sys.argv[1:]])


def guarded(argv: list[str]) -> int:
    """Runs a command; every expected mistake becomes one line on stderr and an exit code."""
    try:
        return dispatch(argv)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from what is saved", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Interrupted) as error:
        return _fail(*told(error))


def told(error: Exception | Interrupted) -> tuple[str, int]:
    """An error in one line, and the exit code; what nobody foresaw leaves its traceback in a file."""
    if isinstance(error, ClpetError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted):
        return str(error), CODE
    for message, code in ((disk_message(error), 1), (hydra_message(error), 2), (cluster_message(error), 1)):
        if message is not None:
            return message, code
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower hardware.micro_batch_size (training) or hardware.eval_batch_size (tests)"
        return f"the device is out of memory: {hint}; finished tasks are saved", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 2
    if os.environ.get("CLPET_DEBUG"):
        raise error
    with tempfile.NamedTemporaryFile("w", prefix="clpet-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    text = (str(error).splitlines() or [""])[0]
    if place := plugin_place(error):
        return f"{place}: {type(error).__name__}: {text} (the whole traceback: {file.name})", 1
    return f"internal error, please report it with {file.name}: {type(error).__name__}: {text}", 1


def _fail(message: str, code: int) -> int:
    print(f"clpet: {inline(' '.join(message.split()))}", file=sys.stderr)
    return code


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
        "export": runs.export, "list": listing, "data": data, "sweep": sweep,
    }  # fmt: skip
    if argv[0] not in handlers:
        raise ConfigError(f"unknown command {argv[0]}{suggest(argv[0], COMMANDS)}")
    return handlers[argv[0]](argv[1:])


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


def complete(argv: list[str]) -> int:
    """Answers the shell: subcommands first, then whatever Hydra knows of the train command's keys."""
    words = os.environ["COMP_LINE"].split(" ")
    if len(words) <= 2:
        print(" ".join(name for name in COMMANDS if name.startswith(words[-1])))
        return 0
    if words[1] in ("show", "eval", "export") and len(words) == 3:
        print(" ".join(path for path in map(str, sorted(Path().glob(RUNS))) if path.startswith(words[-1])))
    if words[1] != "train":
        return 0
    os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return train(argv)


def train(argv: list[str]) -> int:
    """`clpet train`: composes with Hydra and runs."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from clpet.cli.parallel_runs import ParallelSweep
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach `guarded`, which prints one line
    register_resolvers()
    arguments = normalised(argv)
    check_group_options(arguments)

    failures: list[tuple[str, Exception]] = []
    parallel = ParallelSweep(parted(argv)[0])

    def job(cfg: Any) -> float | None:
        from clpet.config.build import typed

        found = HydraConfig.get()
        submitted = found.mode is RunMode.MULTIRUN and "BasicLauncher" not in found.launcher._target_
        code: list[int] = []
        if submitted:
            atexit.register(lambda: code and os._exit(code[0]))
        own = " ".join(word for word in found.overrides.task if word not in arguments)  # what the sweep varies
        try:
            typed(cfg)  # a mistake in a value is told before what takes seconds to import
            if parallel.takes(cfg, found, own):
                return None
            if own and not submitted:
                print(f"\n[{found.job.num + 1}] {inline(own)}\n", flush=True)
            from clpet.cli.launch import launch
            from clpet.reporting.figures import outcome

            out = Path(found.runtime.output_dir)
            finished = launch(cfg, out, list(found.overrides.task)) is not None
        except Exception as error:
            if submitted:  # the launcher carries the error home as an answer: the job has to fail by itself
                code.append(getattr(error, "exit_code", 1))
                raise
            failures.append((own, error))  # the other runs of a sweep go on
            return None
        return outcome(out) if finished else None

    sys.argv = ["clpet train", *arguments]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(job)()
    return _report([*failures, *parallel.run()])


def _report(failures: list[tuple[str, Exception]]) -> int:
    """Prints a line for every run that failed; the exit code of all."""
    codes = []
    for own, error in failures:
        message, code = told(error)
        codes.append(_fail(f"{own}: {message}" if own else message, code))
    return max(codes, default=0)


def normalised(argv: list[str]) -> list[str]:
    """Flags first, wherever they stood; shorthands spelt out; the --config-dir made known to `build`."""
    flags, overrides = parted(argv)
    return [*flags, *overrides]


def parted(argv: list[str]) -> tuple[list[str], list[str]]:
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
            from clpet.config.compose import use_plugins

            use_plugins(given or value)
    return flags, [expand(word) for word in overrides]


def check_group_options(arguments: list[str]) -> None:
    """Raises ConfigError with a suggestion for a group option that does not exist, before Hydra starts."""
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key in GROUPS and re.fullmatch(r"[\w,./-]+", value):
            known = options(key)
            for choice in value.split(","):
                if choice not in known and not (choice == "null" and key in ("experiment", "debug")):
                    raise ConfigError(f"{key}={choice}: there is no such {key}{suggest(choice, known)}")


def options(group: str) -> dict[str, Path]:
    """{option: its YAML} of a config group, the user's own --config-dir included."""
    from clpet.config.compose import conf_dir, plugin_dirs

    found: dict[str, Path] = {}
    for folder in (conf_dir(), *plugin_dirs()):
        for path in sorted((folder / group).glob("**/*.yaml")):
            name = path.relative_to(folder / group).with_suffix("")
            if "base" not in name.parts[:-1]:
                found[name.as_posix()] = path
    return found


def listing(argv: list[str]) -> int:
    """`clpet list methods` prints each option's first comment; `clpet list method NAME` prints the YAML."""
    parser = argparse.ArgumentParser("clpet list", description="What there is to choose from.")
    parser.add_argument(
        "group", nargs="?", help="methods, models, benchmarks, hardware, pefts, replays, experiments, ..."
    )
    parser.add_argument("name", nargs="?", help="print this option's YAML")
    parser.add_argument("--config-dir", help="a folder with your own configs")
    arguments = parser.parse_args(argv)
    if arguments.config_dir:
        normalised(["--config-dir", arguments.config_dir])
    indent = "" if arguments.group else "  "
    for named in [arguments.group] if arguments.group else GROUPS:
        group = named if named in GROUPS else named.removesuffix("s")
        if group not in GROUPS:
            raise ConfigError(f"there is no group {named}{suggest(named, GROUPS)}")
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


def data(argv: list[str]) -> int:
    """`clpet data BENCHMARK key=value ...`: a report on the data, without training."""
    description = "Counts, balance, lengths, repeats and overlaps of a benchmark, without training."
    parser = argparse.ArgumentParser("clpet data", description=description)
    parser.add_argument("benchmark")
    parser.add_argument("overrides", nargs="*", help="such as data_dir=FOLDER model=bert_base benchmark.max_train=100")
    parser.add_argument("--config-dir", help="a folder with your own configs")
    arguments = parser.parse_args(argv)
    folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    words = normalised([*folder, f"benchmark={arguments.benchmark}", *arguments.overrides])[len(folder) :]
    check_group_options(words)
    cfg = composed(words)
    from clpet.evaluation.data_inspection import report

    print(printable(report(cfg)))
    return 0


def sweep(argv: list[str]) -> int:
    """`clpet sweep key=value,value ...`: what scripts/slurm_array.sh asks before it submits."""
    overrides = parted(argv)[1]
    check_group_options(overrides)
    from clpet.cli.slurm_array import plan

    print("\n".join(plan(overrides)))
    return 0
