"""The subcommands that read run directories: runs, show, eval, export. Imports no torch at the top."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.cli.report import NO_TEXTS, REPORT, report_run
from clpet.errors import ConfigError, DataError
from clpet.escape import printable

if TYPE_CHECKING:
    from clpet.reporting.comparison import Comparison
    from clpet.reporting.run_groups import Runs
    from clpet.runs.load_run import RunRecord


def runs(argv: list[str]) -> int:
    """`clpet runs`: lists the runs of a folder, or compares groups of them."""
    parser = _runs_parser()
    arguments = parser.parse_args(argv)
    from clpet.reporting.show import list_runs
    from clpet.runtime.untrusted_json import find_runs

    for name in ("metrics", "view", "by", "against", "picture", "costs", "budget", "sort", "correlate"):
        if getattr(arguments, name) != parser.get_default(name) and not arguments.compare:
            raise ConfigError(f"--{name} needs --compare KEY, such as --compare method")
    folder, benchmark = Path(arguments.folder), arguments.benchmark
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; runs are written to outputs/ unless output_dir is set")
    results = [(path, run) for path, run in find_runs(folder) if benchmark in (None, run["benchmark"])]
    comparison = _compare(arguments, results) if arguments.compare else ""
    print(printable(comparison or list_runs(folder, results, benchmark, arguments.format)))
    return 0


def _runs_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("clpet runs", description="Lists or compares the runs in the output folder.")
    parser.add_argument("folder", nargs="?", default="outputs", help="output folder (default: outputs)")
    parser.add_argument(
        "--compare",
        metavar="KEY",
        help="mean ± standard deviation over seeds by KEY: method, model, train.lr, ..., or several, comma-separated",
    )
    parser.add_argument("--metrics", help="columns to compare, such as average,bwt or zs,cpt,lc; see docs/metrics.md")
    parser.add_argument(
        "--view",
        choices=("all", "own"),
        default="all",
        help="labels to choose from at test time: all seen so far, or only the task's own (task-incremental)",
    )
    parser.add_argument("--costs", action="store_true", help="also show time, FLOPs, stored bytes and memory")
    parser.add_argument("--budget", metavar="COST=N", help="only rows that cost at most N: flops=1e15,stored_bytes=1e6")
    parser.add_argument("--sort", metavar="METRIC", help="sort the rows by a metric or cost, smallest first")
    parser.add_argument("--by", choices=("validation",), help="keep each row's best setting by its validation score")
    parser.add_argument("--against", metavar="NAME", help="row that the others are tested against (default: the best)")
    parser.add_argument(
        "--correlate", nargs=2, metavar=("X", "Y"),
        help="rank correlation of two metrics, costs or probes over the rows: forgetting kl_forward/neutral",
    )  # fmt: skip
    parser.add_argument(
        "--picture", metavar="FILE",
        help="also draw the rows next to each other, with --correlate as points, into a .png, .pdf or .svg",
    )  # fmt: skip
    parser.add_argument("--benchmark", help="only runs of this benchmark")
    parser.add_argument("--format", choices=("text", "md", "csv", "tex"), default="text")
    return parser


def _compare(arguments: argparse.Namespace, runs: "Runs") -> str:
    """The comparison of finished runs as text; with --picture also writes the plot."""
    from clpet.reporting.comparison import Comparison
    from clpet.reporting.run_costs import parse_budget

    if not runs:
        raise DataError(f"{arguments.folder} has no finished runs to compare")
    comparison = Comparison(
        keys=_split_list(arguments.compare),
        metrics=_split_list(arguments.metrics),
        task_incremental=arguments.view == "own",
        by_validation=arguments.by is not None,
        against=arguments.against,
        form=arguments.format,
        costs=arguments.costs,
        budget=parse_budget(arguments.budget or ""),
        sort=arguments.sort,
    )
    if arguments.correlate:
        return _correlated(comparison, arguments, runs)
    text = comparison.report(runs)
    if arguments.picture:
        comparison.draw(runs, Path(arguments.picture))
    return text


def _correlated(comparison: "Comparison", arguments: argparse.Namespace, runs: "Runs") -> str:
    """The comparison, followed by the correlation of two figures; with --picture also writes its points."""
    from clpet.reporting.correlation import correlations, draw, report

    results = correlations(comparison, runs, tuple(arguments.correlate))
    if arguments.picture:
        draw(results, Path(arguments.picture))
    return f"{comparison.report(runs)}\n\n{report(results, arguments.format)}"


def _split_list(text: str | None) -> list[str]:
    """The items of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def show(argv: list[str]) -> int:
    """`clpet show RUN`: scores, matrices and costs of one run."""
    parser = argparse.ArgumentParser("clpet show", description="Scores, matrices and costs of one run.")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--metrics", action="store_true", help="every metric with its formula")
    parser.add_argument("--confusion", action="store_true", help="figures per label and the confusion matrix of tasks")
    parser.add_argument("--mistakes", type=int, default=0, metavar="N", help="the N most confident mistakes of tasks")
    parser.add_argument("--html", nargs="?", const="", metavar="FILE",
                        help="write the run's report instead, one HTML file (default: RUN/report.html)")  # fmt: skip
    parser.add_argument("--no-texts", action="store_true", help=f"in the report, {NO_TEXTS}")
    arguments = parser.parse_args(argv)
    if arguments.no_texts and arguments.html is None:
        raise ConfigError("--no-texts is for --html")
    if arguments.html is not None:
        if arguments.metrics or arguments.confusion or arguments.mistakes:
            raise ConfigError("--metrics, --confusion and --mistakes are printed: leave them or --html out")
        run = Path(arguments.run)
        report_run(run, Path(arguments.html or run / REPORT), not arguments.no_texts)
        return 0
    if arguments.mistakes < 0:
        raise ConfigError(f"--mistakes {arguments.mistakes}: give a number of at least 1")
    if arguments.confusion or arguments.mistakes:
        from clpet.reporting.show_answers import show_answers

        print(printable(show_answers(Path(arguments.run), arguments.confusion, arguments.mistakes)))
        return 0
    from clpet.reporting.show import show as show_run

    print(printable(show_run(Path(arguments.run), arguments.metrics)))
    return 0


def evaluate(argv: list[str]) -> int:
    """`clpet eval RUN`: evaluates the weights of a run on its benchmark, or on tasks of lm-evaluation-harness.

    On its benchmark the scores are compared with the recorded ones: exit code 0 if they are equal, 1 if they differ.
    """
    parser = weights_parser("clpet eval", "Evaluates the weights of a run: on its benchmark, or on other tasks.")
    parser.add_argument("--downstream", metavar="TASKS", help="tasks of lm-evaluation-harness, comma-separated")
    parser.add_argument(
        "--tasks-dir", metavar="DIR", type=Path, help="your own task YAMLs (they can run your own code)"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N examples of each downstream task")
    arguments = parser.parse_args(argv)
    if not arguments.downstream and (arguments.tasks_dir or arguments.limit is not None):
        raise ConfigError("--tasks-dir and --limit are for --downstream TASKS")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {arguments.limit}")
    from clpet.runs import lm_eval  # these import torch: only after the arguments are checked
    from clpet.runs.load_run import load_run
    from clpet.runs.reevaluate import compare_with_recorded
    from clpet.training.trainer import quiet_libraries

    record = recorded_run(arguments)
    names = _split_list(arguments.downstream)
    with quiet_libraries():
        if names:
            lm_eval.check(record.components.objective, record.components.backbone, record.method)
            lm_eval.silence_logs()
            tasks = lm_eval.load_tasks(names, arguments.tasks_dir)  # reports unknown tasks before the model is loaded
            run = load_run(record, arguments.after)
            scores = lm_eval.measure(run.method, run.method.objective.causal, tasks, arguments.limit)
            print(printable(lm_eval.report(run, names, arguments.limit, scores)))
            return 0
        text, equal = compare_with_recorded(load_run(record, arguments.after))
    print(printable(text))
    return 0 if equal else 1


def export(argv: list[str]) -> int:
    """`clpet export RUN FOLDER`: writes the trained weights for use without clpet."""
    parser = weights_parser("clpet export", "Writes the trained weights and the tokenizer for use without clpet.")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into the backbone's weights")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--hub", metavar="USER/NAME", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="a new repository on the hub is public, not private")
    arguments = parser.parse_args(argv)
    if arguments.public and not arguments.hub:
        raise ConfigError("--public needs --hub USER/NAME")
    from clpet.runs.export import prepare, write  # these import torch
    from clpet.runs.hub_upload import check_upload, upload
    from clpet.runs.load_run import load_run
    from clpet.training.trainer import quiet_libraries

    if arguments.hub:
        check_upload(arguments.hub)
    record = prepare(recorded_run(arguments), arguments.folder, arguments.merge)
    with quiet_libraries():
        print(printable(write(load_run(record, arguments.after, needs_data=False), arguments.folder, arguments.merge)))
    if arguments.hub:
        print(f"uploaded to {upload(arguments.folder, arguments.hub, arguments.public)}")
    return 0


def weights_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The arguments that eval, export and predict share."""
    parser = argparse.ArgumentParser(name, description=description)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--after",
        metavar="N",
        type=int,
        help="the weights after N tasks (saved with train.snapshot_every); default: the newest",
    )
    parser.add_argument(
        "--here", metavar="KEY=VALUE", action="append", default=[],
        help="a new location of files or devices: data_dir, cache_dir, model.path, model.chat_template, hardware.*",
    )  # fmt: skip
    parser.add_argument("--allow-plugins", action="store_true", help="run classes of --config-dir and remote code")
    parser.add_argument("--config-dir", help="the folder with your own classes")
    return parser


def recorded_run(arguments: argparse.Namespace) -> "RunRecord":
    """The checked record of the run, with the locations that --here overrides."""
    from clpet.config.compose import add_plugin_dir
    from clpet.runs.load_run import read_record

    if arguments.config_dir:
        if not arguments.allow_plugins:
            raise ConfigError("--config-dir needs --allow-plugins, because the run's record chooses which code is run")
        add_plugin_dir(arguments.config_dir)
    return read_record(arguments.run, arguments.here, arguments.allow_plugins)
