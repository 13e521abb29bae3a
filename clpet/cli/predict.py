"""`clpet predict RUN FILE`: the answers of a run's model to new texts. Imports no torch at the top."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.cli.runs import recorded_run, weights_parser
from clpet.errors import ConfigError, enough_memory
from clpet.escape import EscapingFormatter

if TYPE_CHECKING:
    from clpet.data.text_input import TextInput
    from clpet.evaluation.text_prediction import Answers
    from clpet.runs.load_run import RunRecord

log = logging.getLogger(__name__)


def predict(argv: list[str]) -> int:
    """`clpet predict RUN FILE|-`: a label or an answer for every text, for plain text its perplexity."""
    arguments = _parser().parse_args(argv)
    if arguments.task is not None and arguments.task_column is not None:
        raise ConfigError("--task names the task of all texts, --task-column a column with that of each: give one")
    if arguments.output and arguments.format:
        raise ConfigError("--format is for stdout: the ending of -o names the format of a file")
    with _warnings_on_stderr():
        return _predict(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    from clpet.data.text_input import TaskNames, read_texts  # these import torch: only after the arguments are checked
    from clpet.evaluation.text_prediction import check_task
    from clpet.runs import answer_files

    if arguments.output:
        answer_files.check_path(arguments.output, arguments.file)
    record = recorded_run(arguments)
    names = TaskNames(arguments.task, arguments.task_column)
    traits, decode = record.components.objective.traits, record.config.evaluation.decode
    tasks = record.run_json["tasks"]
    check_task(record.method, traits, decode, tasks, arguments.task or ([] if arguments.task_column else None))
    new = ("perplexity",) if traits.plain_text else ("prediction", "probability", "selected")
    texts, report = read_texts(arguments.file, record.components.source, names, arguments.skip_bad, new)
    check_task(record.method, traits, decode, tasks, texts.tasks if names.are_named else None)
    for note in report.notes():
        log.warning(note)
    columns = {name: [row[name] for row in texts.rows] for name in texts.columns}
    if arguments.output:
        answer_files.check_columns(columns, arguments.output)
    answers = _answers(record, arguments.after, texts)
    if arguments.output:
        answer_files.write_file({**columns, **answers}, arguments.output)
    else:
        write = answer_files.write_jsonl if arguments.format == "jsonl" else answer_files.write_tsv
        write({**columns, **answers}, sys.stdout)
    return 0


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Prints clpet's warnings on stderr, escaped, so that stdout has the answers alone."""
    handler, logger = logging.StreamHandler(), logging.getLogger("clpet")
    handler.setLevel(logging.WARNING)
    handler.setFormatter(EscapingFormatter("%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = weights_parser("clpet predict", "The answers of a run's model to new texts, after the input's columns.")
    parser.add_argument(
        "file", help="a .csv, .tsv, .jsonl, .json, .parquet or .txt file (one text per line), or - for stdin"
    )
    parser.add_argument("--task", metavar="NAME", help="the task of all texts: only its labels compete")
    parser.add_argument("--task-column", metavar="COLUMN", help="the column with the task of each text")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a .csv, .tsv, .jsonl or .parquet file")
    parser.add_argument("--format", choices=("tsv", "jsonl"), help="of what is printed without -o (default: tsv)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out rows without a text instead of refusing them"
    )
    return parser


def _answers(record: "RunRecord", after: int | None, texts: "TextInput") -> "Answers":
    """The columns of answers, from the weights after `after` tasks. Raises ConfigError and DataError."""
    from rich.console import Console

    from clpet.evaluation.text_prediction import answer_texts
    from clpet.reporting.progress import CountDisplay
    from clpet.runs.load_run import load_run
    from clpet.training.trainer import quiet_libraries

    with quiet_libraries(), CountDisplay(Console(stderr=True), "predicted") as display:
        run = load_run(record, after, needs_data=False)
        source = run.session.components.source
        plain = run.method.objective.traits.plain_text
        inputs = [str(text["text"]) for text in texts.texts] if plain else texts.texts
        with enough_memory(run.method.objective.memory_advice):
            return answer_texts(run.method, run.benchmark, source, inputs, run.row, texts.tasks or None, display)
