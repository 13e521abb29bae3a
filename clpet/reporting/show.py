"""`clpet runs` without a comparison (a list of runs) and `clpet show` (one run in full, finished or not)."""

from pathlib import Path
from typing import cast

import numpy as np

from clpet.errors import DataError
from clpet.escape import inline, safe_name
from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import CONVENTIONS, NEEDS, TransferMatrix, on_split, round2
from clpet.records import FAILURE, Description, ProgressLine, Results
from clpet.reporting import row_diagnostics
from clpet.reporting.perplexity_tables import average_table, domain_table, formula_lines, transfer_tables
from clpet.reporting.recorded_objective import direction_of, has_labels
from clpet.reporting.run_groups import Runs
from clpet.reporting.run_metrics import pretraining_metrics, run_metrics
from clpet.reporting.tables import format_table, matrix_table, table
from clpet.runtime.json_lines import parse_line
from clpet.runtime.untrusted_json import (
    as_data_error,
    command,
    find_runs,
    read_json,
    read_results,
    split_of,
    train_command,
)

LIST_HEADER = ["benchmark", "method", "replay", "model", "seed", "split", "average", "bwt", "train s", "run"]
COST_HEADER = ["cost of", "seconds", "forward", "backward", "tokens", "evaluated", "peak MB", "trainable", "stored",
               "replay"]  # fmt: skip


def list_runs(folder: Path, runs: Runs, benchmark: str | None, form: str) -> str:
    """A table with a line per run in an output folder, unfinished ones last."""
    rows = [
        [run["benchmark"], run["method"], run["replay"], run["model"], str(run["seed"]), split_of(run),
         round2(run["average"]), round2(run["backward_transfer"]),
         f"{sum(cost['seconds'] for cost in run['cost']):.0f}", str(path)]
        for path, run in runs
    ]  # fmt: skip
    for path in unfinished_runs(folder, benchmark):
        seed = path.name.split("-")[0][1:]
        status = "failed" if (path / FAILURE).is_file() else "unfinished"
        rows.append([*path.parts[-3:-1], "", "", seed, "", status, "", "", str(path)])
    if not rows:
        return f"no runs{f' of {benchmark}' if benchmark else ''} in {folder} yet; start one with `clpet train`"
    return format_table(LIST_HEADER, rows, form)


def unfinished_runs(folder: Path, benchmark: str | None = None) -> list[Path]:
    """The runs of an output folder that were started and have no results."""
    started = [path.parent for path in sorted(folder.glob(f"{benchmark or '*'}/*/s*-*/run.json"))]
    return [path for path in started if not (path / "results.json").exists()]


def show(path: Path, every_metric: bool) -> str:
    """Matrices, metrics and costs of one run. Raises DataError.

    `every_metric` prints all metrics with their formulas, also those that were not measured.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        if not (path / "run.json").is_file():
            raise DataError(f"{path} is not a run directory: it has neither results.json nor run.json")
        with as_data_error(f"{path} is not a run directory"):
            return _unfinished(path)
    run = read_results(file)
    # Reference runs, such as joint, are looked up in the same output folder: OUTPUT/BENCHMARK/METHOD/RUN/results.json.
    others = find_runs(file.resolve().parents[3]) if len(file.resolve().parts) > 4 else []
    with as_data_error(f"{file} does not contain the results of a run"):
        return _finished(run, others, every_metric)


def _unfinished(path: Path) -> str:
    """The scores so far, from metrics.jsonl, and the command that resumes the run."""
    run, lines = cast(Description, read_json(path / "run.json")), path / "metrics.jsonl"
    matrix = TransferMatrix(run["tasks"], direction_of(run))
    done = 0
    for text in lines.read_text().splitlines() if lines.is_file() else ():
        line = cast(ProgressLine, parse_line(text))
        done = int(line["done"])
        for name, result in line["tasks"].items():
            matrix.scores[int(line["row"]), matrix.tasks.index(name)] = float(result["score"])
    head = f"{run['method']} on {on_split(run['benchmark'], split_of(run))} with {run['model']}, seed {run['seed']}"
    error = failure_of(path)
    failure = "" if error is None else f"\nfailed: {inline(error)}"
    status = f"not finished, {done} tasks done of {len(matrix)}; resume with:\n{train_command(run, run['overrides'])}"
    return "\n\n".join(
        [f"{head}: {status}{failure}", *([matrix_table(matrix)] if np.isfinite(matrix.scores).any() else [])]
    )


def failure_of(path: Path) -> str | None:
    """The error with which the last attempt of a run ended; None if it did not end with one."""
    if not (path / FAILURE).is_file():
        return None
    try:
        return str(read_json(path / FAILURE).get("error"))
    except DataError as error:
        return str(error)


def _finished(run: Results, others: Runs, every_metric: bool) -> str:
    matrix = TransferMatrix.from_json(run)
    further = row_diagnostics.tables(run["diagnostics"], run["tasks"])
    if matrix.direction == "lower":
        return "\n\n".join([_head(run), *_pretraining(run, matrix, others, every_metric), *further, _costs(run)])
    labelled = has_labels(run)
    title = "accuracy among all labels seen so far" if labelled else "score"
    blocks = [_head(run), f"{title}\n{matrix_table(matrix)}"]
    if labelled:
        title = "accuracy among each task's own labels (task-incremental view)"
        blocks.append(f"{title}\n{matrix_table(TransferMatrix.from_json(run, run['task_scores']))}")
    for rows, title in (
        (run["backward"], "backward transfer B[i,j] = R[i,j] - R[j,j]"),
        (run["task_forward"], "forward transfer F[i,j] = R[i,j] - R[0,j], own labels"),
    ):
        transfer = TransferMatrix.from_json(run, rows)
        if (transfer.scores == transfer.scores).any():  # all NaN where the rows it needs were not measured
            blocks.append(f"{title}\n{matrix_table(transfer)}")
    blocks += [_metrics(run, others, every_metric), *further, _costs(run)]
    return "\n\n".join(blocks)


def _head(run: Results) -> str:
    label = " (task given at test: task-incremental)" if run["task_id_at_test"] else ""
    ratio, benchmark = run["parameters"], on_split(run["benchmark"], split_of(run))
    validation = run.get("validation")
    average = f"\naverage on validation after the last task: {round2(validation['average'])}" if validation else ""
    return (
        f"{run['method']} on {benchmark} with {run['model']}, seed {run['seed']}{label}\n"
        f"trained per task {ratio['trainable']:,} of {ratio['total']:,} parameters ({ratio['percent']:.3f} %)\n"
        f"{train_command(run, run['overrides'])}{average}{_extended(run)}"
    )


def _extended(run: Results) -> str:
    source = run.get("extended_from")
    if source is None:
        return ""
    tasks = ", ".join(map(safe_name, source["tasks"]))
    return f"\n{tasks}: learned by {inline(source['run'])}, which this run extends; their costs are of that run"


def _pretraining(run: Results, matrix: TransferMatrix, others: Runs, every_metric: bool) -> list[str]:
    transfer = pretraining_metrics(run, others)
    bits = [run["diagnostics"][-1].get(f"bits_per_byte/{name}") for name in matrix.tasks]
    blocks = [
        f"{run.get('metric', 'perplexity')} after each domain (rows), lower is better\n" + matrix_table(matrix),
        domain_table(transfer, bits),
        average_table(transfer),
        transfer_tables(transfer),
    ]
    if every_metric:
        blocks.append(formula_lines(transfer, command(run, perplexity_transfer.DAPT)))
    return blocks


def _metrics(run: Results, others: Runs, every_metric: bool) -> str:
    values = run_metrics(run, others)
    rows = []
    for name, formula in CONVENTIONS.items():
        value = round2(values[name])
        if values[name] is None and name in NEEDS:  # relative to a reference run that does not exist
            value = "-"
            formula += f"; needs: {command(run, NEEDS[name])}"
        if every_metric or values[name] is not None:
            rows.append([name, value, *([formula] if every_metric else [])])
    if not every_metric:
        return table(["metric", "value"], rows)
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:{width}}  {value:>8}  {formula}" for name, value, formula in rows)


def _costs(run: Results) -> str:
    # Methods such as joint train once on all tasks and have a single cost.
    names = run["tasks"] if len(run["cost"]) == len(run["tasks"]) else ["all tasks"] * len(run["cost"])
    rows = [
        [name, f"{c['seconds']:.1f}", f"{c['forward_examples']:,}", f"{c['backward_examples']:,}",
         f"{c['forward_tokens']:,}", f"{c.get('evaluated_examples', 0):,}", f"{c['peak_memory_mb']:.0f}",
         f"{c['trainable_parameters']:,}", f"{c['stored_parameters']:,}", f"{c['replay_examples']:,}"]
        for name, c in zip(names, run["cost"], strict=True)
    ]  # fmt: skip
    return table(COST_HEADER, rows)
