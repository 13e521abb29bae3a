"""The subcommands about runs that are there: runs, show, eval, export. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any

from clpet.errors import ConfigError, DataError
from clpet.escape import printable


def runs(argv: list[str]) -> int:
    """`clpet runs`: list, or compare by a key."""
    parser = argparse.ArgumentParser("clpet runs", description="Runs in the output folder.")
    parser.add_argument("folder", nargs="?", default="outputs", help="output folder (default: outputs)")
    parser.add_argument(
        "--compare",
        metavar="KEY",
        help="mean ± standard deviation over seeds by KEY: method, model, train.lr, ..., or several with commas",
    )
    parser.add_argument("--metrics", help="columns to compare, such as average,bwt or zs,cpt,lc; see docs/metrics.md")
    parser.add_argument(
        "--view",
        choices=("all", "own"),
        default="all",
        help="labels that compete at test: all seen so far, or each task's own (task-incremental)",
    )
    parser.add_argument("--by", choices=("validation",), help="of several settings show the best one on validation")
    parser.add_argument("--against", metavar="NAME", help="the row to test the others against (default: the best)")
    parser.add_argument("--picture", metavar="FILE", help="also draw the rows side by side (perplexities)")
    parser.add_argument("--benchmark", help="only runs of this benchmark")
    parser.add_argument("--format", choices=("text", "md", "csv", "tex"), default="text")
    arguments = parser.parse_args(argv)
    from clpet.reporting.show import list_runs
    from clpet.runtime.untrusted_json import find_runs

    for name in ("metrics", "view", "by", "against", "picture"):
        if getattr(arguments, name) != parser.get_default(name) and not arguments.compare:
            raise ConfigError(f"--{name} needs --compare KEY, such as --compare method")
    folder, benchmark = Path(arguments.folder), arguments.benchmark
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; runs go to outputs/ unless output_dir says otherwise")
    found = [(path, run) for path, run in find_runs(folder) if benchmark in (None, run["benchmark"])]
    compared = _compared(arguments, found) if arguments.compare else ""
    print(printable(compared or list_runs(folder, found, benchmark, arguments.format)))
    return 0


def _compared(arguments: argparse.Namespace, runs: Any) -> str:
    from clpet.reporting.comparison import Comparison

    if not runs:
        raise DataError(f"{arguments.folder} holds no finished runs to compare")
    comparison = Comparison(
        keys=_words(arguments.compare),
        metrics=_words(arguments.metrics),
        task_incremental=arguments.view == "own",
        by_validation=arguments.by is not None,
        against=arguments.against,
        form=arguments.format,
    )
    text = comparison.report(runs)
    if arguments.picture:
        comparison.plot_groups(runs, Path(arguments.picture))
    return text


def _words(text: str | None) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def show(argv: list[str]) -> int:
    """`clpet show RUN`: one run in full."""
    parser = argparse.ArgumentParser("clpet show", description="One run: figures, matrices and costs.")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--metrics", action="store_true", help="every figure with its formula")
    arguments = parser.parse_args(argv)
    from clpet.reporting.show import show as shown

    print(printable(shown(Path(arguments.run), arguments.metrics)))
    return 0


def evaluate(argv: list[str]) -> int:
    """`clpet eval RUN`: the test sets once more, or tasks of lm-evaluation-harness."""
    parser = _opening("clpet eval", "Tests the weights of a run: on its benchmark, or on tasks of others.")
    parser.add_argument("--downstream", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between")
    parser.add_argument("--tasks-dir", metavar="DIR", type=Path, help="your own task YAMLs (may name code of yours)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N examples of a downstream task")
    arguments = parser.parse_args(argv)
    if not arguments.downstream and (arguments.tasks_dir or arguments.limit is not None):
        raise ConfigError("--tasks-dir and --limit are for --downstream TASKS")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {arguments.limit}")
    from clpet.runs import lm_eval
    from clpet.runs.load_run import load_run
    from clpet.runs.reevaluate import compare_with_recorded
    from clpet.training.trainer import quiet_libraries

    run = _recorded(arguments)
    names = [name for name in (arguments.downstream or "").split(",") if name]
    with quiet_libraries():
        if names:
            lm_eval.check(run)
            lm_eval.silence_logs()
            tasks = lm_eval.load_tasks(names, arguments.tasks_dir)
            opened = load_run(run, arguments.after)
            found = lm_eval.measure(opened, tasks, arguments.limit)
            print(printable(lm_eval.report(opened, names, arguments.limit, found)))
            return 0
        text, equal = compare_with_recorded(load_run(run, arguments.after))
    print(printable(text))
    return 0 if equal else 1


def export(argv: list[str]) -> int:
    """`clpet export RUN FOLDER`: what was trained, for use without clpet."""
    parser = _opening("clpet export", "Writes what a run trained, with its tokenizer, for use without clpet.")
    parser.add_argument("--merge", action="store_true", help="put adapters into the backbone's weights")
    parser.add_argument("folder", type=Path, help="a new folder")
    arguments = parser.parse_args(argv)
    from clpet.runs.export import check, write
    from clpet.runs.load_run import load_run
    from clpet.training.trainer import quiet_libraries

    run = _recorded(arguments)
    check(run, arguments.folder, arguments.merge)
    with quiet_libraries():
        print(printable(write(load_run(run, arguments.after), arguments.folder, arguments.merge)))
    return 0


def _opening(name: str, description: str) -> argparse.ArgumentParser:
    """What the commands that open a run again have in common."""
    parser = argparse.ArgumentParser(name, description=description)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--after",
        metavar="N",
        type=int,
        help="the weights after N tasks (train.snapshot_every saves them); default: newest",
    )
    parser.add_argument(
        "--here", metavar="KEY=VALUE", action="append", default=[],
        help="where things lie now, if elsewhere: data_dir, cache_dir, model.path, hardware.*",
    )  # fmt: skip
    parser.add_argument("--allow-plugins", action="store_true", help="run classes of --config-dir and remote code")
    parser.add_argument("--config-dir", help="the folder with your own classes")
    return parser


def _recorded(arguments: argparse.Namespace) -> Any:
    from clpet.config.compose import add_plugin_dir
    from clpet.runs.load_run import read_record

    if arguments.config_dir:
        if not arguments.allow_plugins:
            raise ConfigError("--config-dir needs --allow-plugins: a recorded run would say which of its code is run")
        add_plugin_dir(arguments.config_dir)
    return read_record(arguments.run, arguments.here, arguments.allow_plugins)
