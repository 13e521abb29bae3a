"""`clpet reproduce TABLE`: tunes every row of a table equally, runs its seeds and orders, and writes the table.

A run that has finished is not run again and a stopped one resumes, so the same command continues after any stop.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clpet.cli.table_plan import TablePlan, missing
from clpet.config.table_spec import TableSpec, read_table, table_files
from clpet.errors import ConfigError
from clpet.escape import inline, printable
from clpet.reporting.planned_run import PlannedRun

OF_TABLE = {"seed", "output_dir", "fresh", "dry_run", "extend"}  # set by a table, or not for it


def reproduce(argv: list[str]) -> int:
    """`clpet reproduce`: the exit code is 0 when the table is complete."""
    arguments = _parser().parse_intermixed_args(argv)
    if not arguments.table:
        print("\n".join(["tables: " + ", ".join(table_files()), "describe one: clpet reproduce TABLE --list"]))
        return 0
    only = [name.strip() for name in (arguments.only or "").split(",") if name.strip()]
    spec = replace(read_table(arguments.table).with_budget(arguments.budget, only), local=arguments.words)
    check_local(spec)
    if arguments.dry_run:
        if arguments.reuse:
            raise ConfigError("--dry-run checks and predicts all runs of a table: leave out --reuse")
        from clpet.cli.table_dry_run import dry_run

        dry_run(spec, arguments.output)
        return 0
    folder = arguments.results / Path(arguments.table).stem / arguments.budget
    plan = TablePlan(spec, arguments.output)
    if arguments.reuse:
        from clpet.cli.reused_rows import reuse

        plan, lines = reuse(plan, folder, arguments.parallel)
        print(printable("\n".join(lines)), file=sys.stderr if arguments.commands else sys.stdout, flush=True)
    tuning = plan.tuning()
    if arguments.list:
        print(printable(describe(plan, tuning, arguments.budget)))
    elif arguments.commands:
        for run in missing(tuning) or missing([*plan.final(tuning), *plan.untuned()]):
            print(f"clpet train {shlex.join(run.words)}")
    else:
        make_table(plan, tuning, folder, arguments.parallel, with_table=not only)
    return 0


def make_table(plan: TablePlan, tuning: Sequence[PlannedRun], folder: Path, parallel: int, with_table: bool) -> None:
    """Carries out the missing runs of a plan, and writes the files of its rows, and `with_table` the table."""
    carry_out(tuning, parallel, "trials on validation data")
    runs, defaults = plan.final(tuning), plan.untuned()
    carry_out([*runs, *defaults], parallel, "runs with the chosen values, and with the defaults")
    from clpet.reporting.result_table import ResultTable

    check_inputs([*tuning, *runs, *defaults])
    table = ResultTable.of(plan.spec, folder.name, tuning, runs, defaults, plan.reused)
    table.write(folder, with_table=with_table)
    print(printable(table.text("text")))
    print(f"\nwritten to {folder}{'' if with_table else ' (the files of these rows; the table needs all rows)'}")
    if with_table and plan.reused:
        print("no report: it is made of the directories of all runs, those of reused figures included")
    elif with_table:
        write_report(plan.spec, runs, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clpet reproduce",
        description="Makes a table of results: tunes every row with equally many trials on validation data, runs all "
        "seeds and orders with the best values, and writes the table. Finished runs are not run again.",
    )
    parser.add_argument("table", nargs="?", help="a table of conf/table, or a YAML file of your own")
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="options of this machine for all runs, such as data_dir=FOLDER"
    )
    parser.add_argument(
        "--budget", default="cpu", help="a budget of the table, such as smoke, cpu or gpu (default: cpu)"
    )
    parser.add_argument("--only", metavar="ROW,ROW", help="only these rows")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the runs (default: outputs)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the table (default: results)")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="take over the figures in --results: run only what they lack, such as a new row, more seeds or orders",
    )
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--list", action="store_true", help="describe the table and what is missing; run nothing")
    parser.add_argument("--dry-run", action="store_true", help="check every run and predict its cost; run nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands of the next missing runs")
    return parser


def check_local(spec: TableSpec) -> None:
    """Raises ConfigError if words of the command line change what the table measures."""
    if not spec.local:
        return
    row = next(iter(spec.rows))
    trial = next(spec.trials(row), [])
    tables = (spec, replace(spec, local=[]))
    given, unchanged = (TablePlan(table, Path()).run(row, trial, spec.seeds[0]) for table in tables)
    of_table = {word.partition("=")[0].lstrip("+") for word in spec.local} & OF_TABLE
    if given.signature != unchanged.signature or of_table:
        raise ConfigError(
            f"{' '.join(spec.local)} would change the runs of the table: give only places and hardware here, such as "
            "data_dir=FOLDER, and other options in the words of a YAML of your own"
        )


def carry_out(runs: Sequence[PlannedRun], parallel: int, what: str) -> None:
    """Carries out the runs that are missing, `parallel` at a time. Raises ConfigError if some fail, after all ended."""
    from clpet.cli.parallel_runs import Job, ParallelSweep, environments
    from clpet.cli.sweep_screen import SweepScreen
    from clpet.config.compose import compose_config
    from clpet.runtime.atomic_io import is_locked, wait_for_lock

    if parallel < 1:
        raise ConfigError(f"--parallel must be at least 1, not {parallel}")
    for run in missing(runs):
        if is_locked(run.out):  # a run of an earlier start that was killed, which has not noticed
            print(f"waiting for a run that is still active: {run.out}", flush=True)
            wait_for_lock(run.out)
    left = missing(runs)
    print(f"{what}: {len(runs) - len(left)} of {len(runs)} finished", flush=True)
    if not left:
        return
    sweep = ParallelSweep([])
    sweep.environments = environments(compose_config(left[0].words), parallel)
    for number, run in enumerate(left, 1):
        sweep.jobs[run.out] = Job(number, [run.row, *run.trial, f"seed={run.seed}"], run.words, run.out)
    screen = SweepScreen(len(left), str(left[0].out.parents[2]))
    failures = sweep.run(screen)
    if failures:
        raise ConfigError(f"{len(failures)} of {len(left)} runs failed; the first: {failures[0][0]}: {failures[0][1]}")


def check_inputs(runs: Sequence[PlannedRun]) -> None:
    """Raises ConfigError if runs were measured on different data, or if data, weights or code have changed since.

    The latter is checked for one run of every row, since it reads the data.
    """
    from clpet.config.build import parse_config
    from clpet.config.compose import compose_config
    from clpet.runs import provenance

    tests: dict[str, tuple[str, Path]] = {}
    checked: set[str] = set()
    for run in {run.out: run for run in runs}.values():
        results = run.results
        if results is None:
            continue
        if run.row not in checked:
            checked.add(run.row)
            provenance.check_finished(run.out, results, parse_config(compose_config(run.words)))
        for task, fingerprint in (results.get("test_sets") or {}).items():
            name = f"{results.get('split')} {run.order} {task}"
            first, where = tests.setdefault(name, (fingerprint, run.out))
            if first != fingerprint:
                raise ConfigError(
                    f"{run.out} and {where} were measured on different examples of task {inline(task)}: give the runs "
                    "of one table one folder and one version of the data (--output)"
                )


def write_report(spec: TableSpec, runs: Sequence[PlannedRun], folder: Path) -> None:
    """Writes the HTML report of a table's runs, without test texts, compared by the options that the rows set."""
    from clpet.cli.report import REPORT, write
    from clpet.errors import need_package

    try:
        need_package("vl_convert", "report", "an HTML report")
    except ConfigError as error:  # after hours of runs not a failure
        print(f"not written: {error}")
        return
    words = [word for row in spec.rows.values() for word in row.words]
    keys = list(dict.fromkeys(word.partition("=")[0].lstrip("+") for word in words))
    finished = [(run.out, results) for run in {run.out: run for run in runs}.values() if (results := run.results)]
    write(folder / REPORT, spec.title, finished, keys or ["method"], [], with_texts=False)


def describe(plan: TablePlan, tuning: Sequence[PlannedRun], budget: str) -> str:
    """What a table consists of, and what of it is missing: its trials, and the further runs of rows that are reused."""
    spec, trials = plan.spec, sum(len(list(plan.spec.trials(row))) for row in plan.spec.rows)
    further = len(missing([run for row in plan.reused for run in plan.further(row)]))
    grid = ", ".join(f"{key} in {list(values)}" for key, values in spec.grid.items()) or "nothing is tuned"
    return "\n".join(
        [
            f"{spec.title} (budget {budget})",
            f"rows    {', '.join(spec.rows)}",
            f"tuning  {trials} trials on validation data, equally many for every row that can be tuned: {grid}",
            f"runs    {len(spec.rows)} rows x {len(spec.orders)} orders x {len(spec.seeds)} seeds; "
            f"and {len(spec.seeds)} with the defaults for every row that is tuned",
            f"missing {len(missing(tuning))} of {trials} trials"
            f"{f', {further} runs of {len(plan.reused)} rows that are reused' if plan.reused else ''}",
        ]
    )
