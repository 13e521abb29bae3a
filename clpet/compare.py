"""Finished runs read back: lists, one run in full, and comparisons over seeds with a paired test."""

import contextlib
import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clpet import pretraining
from clpet.console import matrix_table, table
from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import latex, markdown, spreadsheet
from clpet.groups import Group, group_by
from clpet.pretraining_tables import average_table, domain_table, formula_lines, transfer_tables
from clpet.reading import command, read_json, read_results, readable
from clpet.results import CONVENTIONS, NEEDS, TransferMatrix, round2

COLUMNS = ("average", "whole", "bwt", "fwt", "forgetting", "learning_accuracy")  # of a comparison, by default
DRAWS = 2000  # bootstrap resamples


def find_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, results) of every finished run below a folder, by path. A file that is no result is passed over."""
    found = []
    for path in sorted(folder.glob("*/*/s*-*/results.json")):
        with contextlib.suppress(DataError, OSError):
            found.append((path.parent, read_results(path)))
    return found


def report(folder: Path, key: str | None, metrics: Sequence[str], benchmark: str | None, form: str) -> str:
    """What `clpet runs` prints."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; runs go to outputs/ unless output_dir says otherwise")
    runs = [(path, run) for path, run in find_runs(folder) if benchmark in (None, run["benchmark"])]
    if not key:
        return _listing(folder, runs, benchmark, form)
    if not runs:
        raise DataError(f"{folder} holds no finished runs to compare")
    known = {**CONVENTIONS, **pretraining.FORMULAS}
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"there is no metric {metric}{suggest(metric, known)}")
    parts = []
    for name in dict.fromkeys(run["benchmark"] for _, run in runs):
        own = [(path, run) for path, run in runs if run["benchmark"] == name]
        groups, lower = group_by(own, key), own[0][1]["direction"] == "lower"
        columns = metrics or (pretraining.COLUMNS if lower else COLUMNS)
        header = [key, "seeds", *columns]
        rows = [
            [value, str(len(group)), *(spread(group, metric, own) for metric in columns)]
            for value, group in groups.items()
        ]
        title = f"{name}: {'perplexity, lower is better, ' * lower}mean ± standard deviation over seeds\n"
        parts.append((title if form == "text" else "") + formatted(header, rows, form))
        if form in ("text", "md") and not lower and (tests := significance(groups)):
            parts.append(tests)
    return "\n\n".join(part.strip("\n") for part in parts)


def picture(folder: Path, key: str, benchmark: str | None, path: Path) -> Path:
    """Groups of pretraining runs side by side. Raises ConfigError where they are not runs of one such benchmark."""
    from clpet.pretraining_plots import side_by_side

    runs = [(place, run) for place, run in find_runs(folder) if benchmark in (None, run["benchmark"])]
    names = sorted({run["benchmark"] for _, run in runs if run["direction"] == "lower"})
    if runs and not names:
        raise ConfigError("--picture draws perplexities, and these runs have accuracies: leave it out")
    if len(names) != 1:
        raise ConfigError(f"--picture draws one benchmark of perplexities: say --benchmark{suggest('', names)}")
    own = [(place, run) for place, run in runs if run["benchmark"] == names[0]]
    groups = {
        value: [pretraining_figures(run, own) for _, run in group if run["method"] != pretraining.DAPT]
        for value, group in group_by(own, key).items()
    }
    return side_by_side({value: found for value, found in groups.items() if found}, key, path, names[0])


def _listing(folder: Path, runs: list[tuple[Path, dict[str, Any]]], benchmark: str | None, form: str) -> str:
    rows = [
        [run["benchmark"], run["method"], run["replay"], run["model"], str(run["seed"]), round2(run["average"]),
         round2(run["backward_transfer"]), f"{sum(cost['seconds'] for cost in run['cost']):.0f}", str(path)]
        for path, run in runs
    ]  # fmt: skip
    recorded = sorted(folder.glob(f"{benchmark or '*'}/*/s*-*/run.json"))
    started = [path.parent for path in recorded if not (path.parent / "results.json").exists()]
    rows += [
        [*path.parts[-3:-1], "", "", path.name.split("-")[0][1:], "unfinished", "", "", str(path)] for path in started
    ]
    if not rows:
        return f"no runs{f' of {benchmark}' if benchmark else ''} in {folder} yet; start one with `clpet train`"
    return formatted(["benchmark", "method", "replay", "model", "seed", "average", "bwt", "train s", "run"], rows, form)


def spread(group: Group, metric: str, runs: Group) -> str:
    """mean ± standard deviation (n - 1) of a metric over a group's seeds."""
    values = [value for path, run in group if (value := figures(run, runs).get(metric)) is not None]
    if not values or len(values) < len(group):
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def figures(run: dict[str, Any], runs: Group) -> dict[str, float | None]:
    """Every convention of a run, those that need a joint or independent run taken from `runs` where it is there."""
    matrix = TransferMatrix.from_json(run)
    found = matrix.metrics(**{name: reference(run, runs, name) for name in ("independent", "joint")})
    if matrix.direction == "lower":
        found |= pretraining.headline(pretraining_figures(run, runs))
    return found


def pretraining_figures(run: dict[str, Any], runs: Group) -> dict[str, Any]:
    """The figures of a run of perplexities, with DAPT from the diagonal of a dapt run of the same setting and seed."""
    matrix, alone = TransferMatrix.from_json(run), None
    if found := reference(run, runs, pretraining.DAPT):
        known = dict(zip(found.tasks, pretraining.own_checkpoint(found.scores), strict=True))
        alone = np.array([known.get(name, np.nan) for name in matrix.tasks])
    groups = {name: part["domains"] for name, part in run["pretraining"]["groups"].items()}
    return pretraining.figures(matrix.scores, matrix.tasks, alone, groups)


def reference(run: dict[str, Any], runs: Group, method: str) -> TransferMatrix | None:
    """The matrix of the reference run of the same setting and seed: any method of a sweep finds the same one."""
    for _, other in runs:
        if (other["method"], other["setting"], other["seed"]) == (method, run["setting"], run["seed"]):
            return TransferMatrix.from_json(other)
    return None


def formatted(header: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """A table as text, Markdown, CSV or LaTeX."""
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(spreadsheet, row) for row in (header, *rows)])
        return text.getvalue().rstrip("\n")
    if form == "md":
        lines = [f"| {' | '.join(map(markdown, row))} |" for row in (header, *rows)]
        return "\n".join([lines[0], f"| --- |{' ---: |' * (len(header) - 1)}", *lines[1:]])
    if form == "tex":
        body = [" & ".join(latex(cell) for cell in row) + r" \\" for row in rows]
        head = " & ".join(latex(cell) for cell in header) + r" \\"
        columns = "l" + "r" * (len(header) - 1)
        return "\n".join(
            [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"]
        )
    return table(header, rows)


def significance(groups: dict[str, Group]) -> str:
    """Paired bootstrap of the final average accuracy between the best group and each other one.

    Runs that were given the task at test answer an easier question and are left out.
    """
    hits = {name: final_hits(group) for name, group in groups.items() if not group[0][1]["task_id_at_test"]}
    known = {name: value for name, value in hits.items() if value}
    if len(known) < 2:
        return ""
    means = {
        name: np.mean([task.mean() for run in value.values() for task in run.values()]) for name, value in known.items()
    }
    best = max(means, key=lambda name: means[name])
    rows = []
    for name in known:
        if name != best and (found := paired_bootstrap(known[best], known[name])):
            difference, low, high, p, seeds = found
            rows.append([name, f"{difference:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{p:.4f}", str(seeds)])
    if not rows:
        return ""
    head = (
        f"{best} minus each other, final average score: paired bootstrap over test examples and seeds ({DRAWS} draws)"
    )
    return head + "\n" + table(["other", "difference", "95 % interval", "p", "paired seeds"], rows)


Hits = dict[int, dict[str, np.ndarray]]  # seed -> task -> score from 0 to 1 per test example


def final_hits(group: Group) -> Hits:
    """How right each test example is after the last task, from 0 to 1, read from the kept predictions."""
    import pyarrow.parquet

    found: Hits = {}
    for path, run in group:
        file = path / "predictions" / f"after-{len(run['tasks']):03d}.parquet"
        if file.is_file():
            rows = pyarrow.parquet.read_table(file).to_pydict()
            task, score = np.array(rows["task"]), np.array(rows["score"], dtype=float)
            found[run["seed"]] = {name: score[task == name] for name in run["tasks"]}
    return found


def paired_bootstrap(a: Hits, b: Hits, draws: int = DRAWS) -> tuple[float, float, float, float, int] | None:
    """(difference in percent, 2.5 % and 97.5 % quantiles, two-sided p, number of seeds both have).

    Each draw resamples the seeds both have and, inside every task, the test examples, the same ones for a and
    b; the statistic is the mean over tasks of the accuracy difference. None when nothing can be paired.
    """
    seeds = [s for s in sorted(a.keys() & b.keys()) if all(len(a[s][t]) == len(b[s].get(t, ())) for t in a[s])]
    if not seeds:
        return None
    rng = np.random.default_rng(0)
    differences = {seed: {task: a[seed][task] - b[seed][task] for task in a[seed]} for seed in seeds}
    observed = 100 * np.mean([d.mean() for s in seeds for d in differences[s].values()])
    statistics = np.empty(draws)
    for draw in range(draws):
        chosen = rng.choice(seeds, len(seeds))
        means = []
        for task in differences[seeds[0]]:
            size = len(differences[seeds[0]][task])
            places = rng.integers(size, size=size)
            means += [differences[seed][task][places].mean() for seed in chosen]
        statistics[draw] = 100 * np.mean(means)
    low, high = np.quantile(statistics, [0.025, 0.975])
    tail = min((statistics <= 0).mean(), (statistics >= 0).mean())
    return float(observed), float(low), float(high), float(min(1.0, 2 * tail + 1 / draws)), len(seeds)


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
    head = f"{run['method']} on {run['benchmark']} with {run['model']}, seed {run['seed']}"
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
    ratio = run["parameters"]
    return (
        f"{run['method']} on {run['benchmark']} with {run['model']}, seed {run['seed']}{label}\n"
        f"trained per task {ratio['trainable']:,} of {ratio['total']:,} parameters ({ratio['percent']:.3f} %)\n"
        f"clpet train {shlex.join(run['overrides'])}"
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
    return [*parts, formula_lines(found, command(run, pretraining.DAPT))] if every else parts


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
