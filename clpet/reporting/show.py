"""Runs read back one by one: a list of them, and one in full, finished or not."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from clpet.errors import DataError
from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import CONVENTIONS, NEEDS, TransferMatrix, on_split, round2
from clpet.reporting.figures import figures, pretraining_figures
from clpet.reporting.perplexity_tables import average_table, domain_table, formula_lines, transfer_tables
from clpet.reporting.run_groups import Group
from clpet.reporting.tables import formatted, matrix_table, table
from clpet.runtime.untrusted_json import command, find_runs, read_json, read_results, readable, split_of


def listing(folder: Path, runs: Group, benchmark: str | None, form: str) -> str:
    """What `clpet runs` prints without a comparison: a line per run, unfinished ones last."""
    rows = [
        [run["benchmark"], run["method"], run["replay"], run["model"], str(run["seed"]), split_of(run),
         round2(run["average"]), round2(run["backward_transfer"]),
         f"{sum(cost['seconds'] for cost in run['cost']):.0f}", str(path)]
        for path, run in runs
    ]  # fmt: skip
    recorded = sorted(folder.glob(f"{benchmark or '*'}/*/s*-*/run.json"))
    for path in [path.parent for path in recorded if not (path.parent / "results.json").exists()]:
        seed = path.name.split("-")[0][1:]
        rows.append([*path.parts[-3:-1], "", "", seed, "", "unfinished", "", "", str(path)])
    if not rows:
        return f"no runs{f' of {benchmark}' if benchmark else ''} in {folder} yet; start one with `clpet train`"
    header = ["benchmark", "method", "replay", "model", "seed", "split", "average", "bwt", "train s", "run"]
    return formatted(header, rows, form)


def show(path: Path, every_metric: bool) -> str:
    """What `clpet show` prints of one run."""
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        if not (path / "run.json").is_file():
            raise DataError(f"{path} is not a run directory: no results.json there")
        with readable(f"{path} is not the directory of a run"):
            return _so_far(path)
    run = read_results(file)
    others = find_runs(file.resolve().parents[3]) if len(file.resolve().parts) > 4 else []
    with readable(f"{file} is not the result of a run"):
        return _shown(run, others, every_metric)


def _so_far(path: Path) -> str:
    """What a run that is not finished has measured."""
    run, lines = read_json(path / "run.json"), path / "metrics.jsonl"
    matrix = TransferMatrix(run["tasks"], "lower" if run["objective"] == "language_modeling" else "higher")
    done = 0
    for line in map(json.loads, lines.read_text().splitlines() if lines.is_file() else ()):
        done = int(line["done"])
        for name, found in line["tasks"].items():
            matrix.scores[int(line["row"]), matrix.tasks.index(name)] = float(found["score"])
    head = f"{run['method']} on {on_split(run['benchmark'], split_of(run))} with {run['model']}, seed {run['seed']}"
    goes_on = (
        f"not finished, {done} tasks done of {len(matrix)}; this goes on:\nclpet train {shlex.join(run['overrides'])}"
    )
    return "\n\n".join([f"{head}: {goes_on}", *([matrix_table(matrix)] if np.isfinite(matrix.scores).any() else [])])


def _shown(run: dict[str, Any], others: Group, every_metric: bool) -> str:
    matrix = TransferMatrix.from_json(run)
    if matrix.direction == "lower":
        return "\n\n".join([_head(run), *_pretraining(run, matrix, others, every_metric), _costs(run)])
    words = run.get("objective") == "text_to_text"
    parts = [_head(run), ("score" if words else "accuracy among all labels seen so far") + "\n" + matrix_table(matrix)]
    if not words:
        own = TransferMatrix.from_json({**run, "scores": run["task_scores"]})
        parts.append("accuracy among each task's own labels (task-incremental view)\n" + matrix_table(own))
    backward = TransferMatrix.from_json({**run, "scores": run["backward"]})
    if (backward.scores == backward.scores).any():
        parts.append("backward transfer B[i,j] = R[i,j] - R[j,j]\n" + matrix_table(backward))
    forward = TransferMatrix.from_json({**run, "scores": run["task_forward"]})
    if (forward.scores == forward.scores).any():
        parts.append("forward transfer F[i,j] = R[i,j] - R[0,j], own labels\n" + matrix_table(forward))
    parts += [_metrics(run, others, every_metric), _costs(run)]
    return "\n\n".join(parts)


def _head(run: dict[str, Any]) -> str:
    label = " (task given at test: task-incremental)" if run["task_id_at_test"] else ""
    ratio, found, benchmark = run["parameters"], run.get("validation"), on_split(run["benchmark"], split_of(run))
    chosen = f"\naverage on validation after the last task: {round2(found['average'])}" if found else ""
    return (
        f"{run['method']} on {benchmark} with {run['model']}, seed {run['seed']}{label}\n"
        f"trained per task {ratio['trainable']:,} of {ratio['total']:,} parameters ({ratio['percent']:.3f} %)\n"
        f"clpet train {shlex.join(run['overrides'])}{chosen}"
    )


def _pretraining(run: dict[str, Any], matrix: TransferMatrix, others: Group, every: bool) -> list[str]:
    found = pretraining_figures(run, others)
    bits = [run["diagnostics"][-1].get(f"bits_per_byte/{name}") for name in matrix.tasks]
    parts = [
        f"{run.get('metric', 'perplexity')} after each domain (rows), lower is better\n" + matrix_table(matrix),
        domain_table(found, bits),
        average_table(found),
        transfer_tables(found),
    ]
    return [*parts, formula_lines(found, command(run, perplexity_transfer.DAPT))] if every else parts


def _metrics(run: dict[str, Any], others: Group, every: bool) -> str:
    values = figures(run, others)
    rows = []
    for name, formula in CONVENTIONS.items():
        value = round2(values[name])
        if values[name] is None and name in NEEDS:
            value = "-"
            formula += f"; needs: {command(run, NEEDS[name])}"
        if every or values[name] is not None:
            rows.append([name, value, *([formula] if every else [])])
    if not every:
        return table(["metric", "value"], rows)
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:{width}}  {value:>8}  {formula}" for name, value, formula in rows)


def _costs(run: dict[str, Any]) -> str:
    header = [
        "cost of",
        "seconds",
        "forward",
        "backward",
        "tokens",
        "evaluated",
        "peak MB",
        "trainable",
        "stored",
        "replay",
    ]
    names = run["tasks"] if len(run["cost"]) == len(run["tasks"]) else ["all tasks"] * len(run["cost"])
    rows = [
        [name, f"{c['seconds']:.1f}", f"{c['forward_examples']:,}", f"{c['backward_examples']:,}",
         f"{c['forward_tokens']:,}", f"{c.get('evaluated_examples', 0):,}", f"{c['peak_memory_mb']:.0f}",
         f"{c['trainable_parameters']:,}", f"{c['stored_parameters']:,}", f"{c['replay_examples']:,}"]
        for name, c in zip(names, run["cost"], strict=True)
    ]  # fmt: skip
    return table(header, rows)
