"""`clpet report FOLDER`: one HTML file about the runs of a folder. Imports no torch."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.errors import ConfigError, DataError, need_package
from clpet.escape import printable

if TYPE_CHECKING:
    from clpet.reporting.run_groups import Runs

REPORT = "report.html"  # the file, unless another name is given
NO_TEXTS = "leave out the test texts, which are otherwise shown with mistakes if the data can be read again"


def report(argv: list[str]) -> int:
    """`clpet report`: writes tables, charts, matrices and answers of the runs of a folder into one HTML file."""
    parser = argparse.ArgumentParser(
        "clpet report",
        description="Writes one HTML file about the finished runs of a folder, to look at and to send: it needs "
        "neither a network nor a server.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="output folder (default: outputs)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(REPORT), metavar="FILE",
                        help=f"the file to write (default: {REPORT})")  # fmt: skip
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]",
                        help="only runs with one of these values, such as method=kif,ewc; may be repeated")  # fmt: skip
    parser.add_argument("--compare", default="method", metavar="KEY[,KEY]",
                        help="options that make the rows of the tables (default: method)")  # fmt: skip
    parser.add_argument("--no-texts", action="store_true", help=NO_TEXTS)
    arguments = parser.parse_args(argv)
    from clpet.reporting.report.page import select
    from clpet.reporting.show import failure_of, unfinished_runs
    from clpet.runtime.untrusted_json import find_runs

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; runs are written to outputs/ unless output_dir is set")
    check_file(arguments.output)
    runs = find_runs(folder)
    if not runs:
        raise DataError(f"{folder} has no finished runs to report; start one with `clpet train`")
    keys = [key.strip() for key in arguments.compare.split(",") if key.strip()]
    if not keys:
        raise ConfigError("--compare needs an option, such as --compare method")
    failures = {path: failure_of(path) for path in unfinished_runs(folder)}
    unfinished = [
        f"{path}: {'stopped, or still running' if error is None else f'failed: {error}'}"
        for path, error in failures.items()
    ]
    chosen = select(runs, arguments.where)
    write(arguments.output, str(folder), chosen, keys, unfinished, not arguments.no_texts)
    return 0


def report_run(path: Path, file: Path, with_texts: bool) -> None:
    """Writes the report of one run for `clpet show RUN --html`. Raises ConfigError and DataError."""
    from clpet.runtime.untrusted_json import read_results

    if not (path / "results.json").is_file():
        raise DataError(f"{path} is not the directory of a finished run: it has no results.json")
    check_file(file)
    run = read_results(path / "results.json")
    title = f"{run['method']} on {run['benchmark']}, seed {run['seed']}"
    write(file, title, [(path, run)], ["method"], [], with_texts)


def write(file: Path, title: str, runs: "Runs", keys: list[str], unfinished: list[str], with_texts: bool) -> None:
    """Writes the report, and prints its file with the number of runs and of texts in it, and its size."""
    from clpet.reporting.report.page import build_report, write_report
    from clpet.runs.recorded_texts import RecordedTexts
    from clpet.runtime.untrusted_json import as_data_error

    with as_data_error("the report cannot be made"):
        report = build_report(title, runs, keys, unfinished, RecordedTexts() if with_texts else None)
    write_report(report, file)
    num_texts = sum(section.num_texts for section in report.sections)
    texts = f", {num_texts} test texts (--no-texts leaves them out)" if num_texts else ""
    print(printable(f"{file}: {len(runs)} run{'s' * (len(runs) > 1)}, {file.stat().st_size / 1e6:.1f} MB{texts}"))


def check_file(file: Path) -> None:
    """Raises ConfigError unless a page can be written to `file`."""
    need_package("vl_convert", "report", "an HTML report")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: give the name of a file, such as {file / REPORT}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file.parent} is not a folder: create it, or give another file")
