"""The run directory: what a run writes at its start and its end, and how a finished one is recognised."""

import csv
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import save_file

from clpet.data.benchmark import Benchmark
from clpet.errors import DataError
from clpet.escape import inline, spreadsheet
from clpet.methods.base import Method
from clpet.metrics import perplexity_transfer
from clpet.metrics.perplexity_transfer import DAPT
from clpet.metrics.transfer_matrix import TransferMatrix, on_split, round2, tolist
from clpet.models.adapters import parameter_ratio
from clpet.reporting.perplexity_tables import LEGEND, average_table
from clpet.reporting.tables import matrix_table, say
from clpet.runs.provenance import git_revision, hub_data, versions
from clpet.runtime.atomic_io import whole, write_atomic
from clpet.runtime.distributed import world
from clpet.runtime.run_checkpoint import RunState, write_tree
from clpet.runtime.untrusted_json import command, read_json, read_results, split_of

log = logging.getLogger(__name__)

MADE = ("results.json", "transfer.csv", "*.png", "metrics.jsonl", "run.json", "downstream-*.json")


def finished(out: Path) -> dict[str, Any] | None:
    """The results of a finished run; results.json is written last, so its presence means that all is there."""
    if not (out / "results.json").is_file():
        return None
    try:
        return read_results(out / "results.json")
    except DataError as error:
        log.warning("%s: it is written again from what was saved", error)
        return None


def clear(out: Path) -> None:
    """Removes what an earlier run left in its directory."""
    for pattern in MADE:
        for path in out.glob(pattern):
            path.unlink()
    for name in ("state", "predictions", "adapters", "heads", "checkpoints", "wandb"):
        shutil.rmtree(out / name, ignore_errors=True)


def heading(method: Method, benchmark: Benchmark, objective: str, split: str) -> str:
    """The first line of a run: what is learned, and what was resolved from the method and the data."""
    labels = f", {len(benchmark.labels)} labels" if benchmark.labels else ""
    compete = {None: "", "task": "; softmax over each task's own labels", "seen": "; softmax over all labels seen"}
    chosen = "".join(f"; {key}={value}" for key, value in method.resolved(benchmark).items())
    return (
        f"{method.name} on {on_split(benchmark.name, split)}: {len(benchmark)} tasks{labels}"
        f"{compete[softmax(benchmark, objective)]}{chosen}"
    )


def softmax(benchmark: Benchmark, objective: str) -> str | None:
    """Which labels compete in the loss of a classification, as benchmark.softmax=auto was resolved."""
    return ("task" if benchmark.own_softmax else "seen") if objective == "classification" else None


def start(
    out: Path,
    cfg: DictConfig,
    overrides: list[str],
    identity: dict[str, str],
    benchmark: Benchmark,
    host: dict[str, Any],
    resumes: bool = False,
) -> None:
    """Writes run.json: what is run, on what (`host`, of Hardware.record), with which versions."""
    if resumes:
        _warn_of_rounding(out, host)
    record = {
        **_who(cfg, overrides, identity, benchmark),
        "host": host,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "data": benchmark.data_record,
    }
    write_atomic(out / "run.json", json.dumps(record, indent=1))


def _warn_of_rounding(out: Path, host: dict[str, Any]) -> None:
    """Warns where a run that resumes began on hardware that rounds differently: its end is not equal bit for bit."""
    try:
        before = read_json(out / "run.json").get("host")
    except DataError:
        return
    if isinstance(before, dict) and (other := [key for key in host if before.get(key, host[key]) != host[key]]):
        changed = ", ".join(f"{key} {before[key]}, now {host[key]}" for key in other)
        log.warning("the run began with %s: it ends equal to rounding, not bit for bit", inline(changed))


def collect(
    out: Path,
    cfg: DictConfig,
    overrides: list[str],
    identity: dict[str, str],
    method: Method,
    benchmark: Benchmark,
    state: RunState,
) -> dict[str, Any]:
    """Writes adapters, heads and transfer.csv; returns what results.json will hold."""
    method.save(out / "adapters")
    save_heads(method, out / "heads")
    write_atomic(out / "transfer.csv", transfer_csv(state.matrix, cfg.evaluation.split))
    return {
        **_who(cfg, overrides, identity, benchmark),
        **state.matrix.to_json(),
        "backward": tolist(state.matrix.backward),
        "forward": tolist(state.matrix.forward),
        "task_scores": tolist(state.own.scores),
        "task_backward": tolist(state.own.backward),
        "task_forward": tolist(state.own.forward),
        "task_id_at_test": method.task_id_at_test,
        "resolved": method.resolved(benchmark),
        "metric": benchmark.tasks[0].metric,
        **({"validation": state.validation} if state.validation else {}),
        "test_sets": benchmark.fingerprints(cfg.evaluation.split),
        **headline(state.matrix),
        "metrics": state.matrix.metrics(),
        "task_metrics": state.own.metrics(),
        **_pretraining(state.matrix, benchmark),
        "diagnostics": state.diagnostics,
        "parameters": parameter_ratio(method.trainable_parameters(), method.objective.adapters.base_parameters),
        "dropout": method.objective.adapters.dropout(),
        "cost": state.costs,
        "data": benchmark.data_record,
    }


def save_heads(method: Method, folder: Path) -> None:
    """Writes every classification head as safetensors, its labels in the metadata."""
    folder.mkdir(exist_ok=True)
    names, labels = method.benchmark.names, method.benchmark.labels
    for name, head in method.heads().items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in head.named_parameters()}
        rows = [labels[label] for label in head.labels] if name != "selector" else names
        save_file(tensors, folder / f"{name}.safetensors", metadata={"labels": json.dumps(rows)})


def kept(out: Path, row: int) -> Path:
    """Where what was trained lies after the first `row` tasks, with train.keep."""
    return out / "checkpoints" / f"after-{row:03d}"


def keep(out: Path, row: int, method: Method) -> None:
    """Writes what was trained so far: as in adapters/ and heads/, and what else the method reads at test."""
    state = method.state_dict()
    if method.objective.adapters.config is None:  # the weights of the whole model lie beside it already
        state["objective"] = {**state["objective"], "adapters": {}}
    if not world().main:
        return
    with whole(kept(out, row)) as folder:
        method.save(folder)
        save_heads(method, folder / "heads")
        write_tree(folder / "state", {"row": row, "method": state})


def finish(out: Path, results: dict[str, Any]) -> None:
    """Writes results.json, after all else: from now on the run is finished."""
    write_atomic(out / "results.json", json.dumps(_finite(results), indent=1, allow_nan=False))


def _finite(node: Any) -> Any:
    """None in place of what JSON has no word for: an infinite perplexity, whose sums lie beside it."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def headline(matrix: TransferMatrix) -> dict[str, float | None]:
    """The figures that scripts read by name."""
    return {
        "average": matrix.average(),
        "whole": matrix.whole(),
        "backward_transfer": matrix.backward_transfer(),
        "forward_transfer": matrix.forward_transfer(),
        "forgetting": matrix.forgetting(),
        "learning_accuracy": matrix.learning_accuracy(),
    }


def _pretraining(matrix: TransferMatrix, benchmark: Benchmark) -> dict[str, Any]:
    if matrix.direction == "higher":
        return {}
    return {"pretraining": perplexity_transfer.figures(matrix.scores, matrix.tasks, groups=benchmark.groups)}


def pictures(out: Path, state: RunState, method: str, benchmark: Benchmark, split: str = "test") -> list[Path]:
    """Draws the matrix and the curves, and the similarities behind an order of domains."""
    title = f"{method} on {on_split(benchmark.name, split)}"
    if state.matrix.direction == "lower":
        from clpet.reporting.plots.perplexity import draw

        return draw(out, state.matrix, benchmark.data_record.get("order"), title)
    from clpet.reporting.plots.matrix import accuracy_curves, transfer_heatmap

    return [
        transfer_heatmap(state.matrix, out / "transfer.png", title),
        accuracy_curves(state.matrix, out / "accuracy.png", title),
    ]


def transfer_csv(matrix: TransferMatrix, split: str = "test") -> str:
    """Header after,<task>,..., of another split "after (validation)"; rows 0 to T; an empty cell was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([on_split("after", split), *map(spreadsheet, matrix.tasks)])
    for index, values in enumerate(matrix.scores):
        writer.writerow([index, *("" if v != v else repr(float(v)) for v in values)])
    return text.getvalue()


def task_cost(method: Method) -> dict[str, Any]:
    """What learning the last task cost, with the parameters it trained and what is kept."""
    return {
        **method.objective.meter.take_learning(),
        "trainable_parameters": method.trainable_parameters(),
        "stored_parameters": method.stored_parameters(),
        "replay_examples": method.stored_examples(),
    }


def show_finished(console: Console, out: Path, results: dict[str, Any]) -> None:
    """The final table, where the run lies, and what to try next."""
    matrix = TransferMatrix.from_json(results)

    words, lower = results.get("objective") == "text_to_text", matrix.direction == "lower"
    what = f"{'score' if words else 'accuracy'} in % after each task (rows)"
    what = f"{results.get('metric', 'perplexity')} after each domain (rows), lower is better" if lower else what
    benchmark = on_split(results["benchmark"], split_of(results))
    say(console, f"{results['method']} on {benchmark}, seed {results['seed']}: {what}")
    say(console, matrix_table(matrix))
    say(console)
    if lower:
        say(console, average_table(results["pretraining"]))
        say(console, LEGEND)
    else:
        for name in ("average", "whole", "backward_transfer", "forgetting", "learning_accuracy"):
            say(console, f"{name.replace('_', ' '):18} {round2(results[name]):>7}")
    if found := results.get("validation"):
        say(console, f"{'validation average':18} {round2(found['average']):>7}")
    for name, value in results["diagnostics"][-1].items():
        if name != "row" and "/" not in name:
            say(console, f"{name.replace('_', ' '):18} {round2(value):>7}")
    ratio = results["parameters"]
    say(
        console,
        f"trained per task   {ratio['trainable']:,} of {ratio['total']:,} parameters ({ratio['percent']:.2f} %)",
    )
    say(console)
    say(console, f"run   {out}")
    say(console, f"next  clpet show {out}")
    better = DAPT if lower else "o_lora" if words else "dynamic_conpet"
    other = better if results["method"] in ("sequential", "joint", "independent") else "sequential"
    say(console, f"      {command(results, other)}")


def _who(cfg: DictConfig, overrides: list[str], identity: dict[str, str], benchmark: Benchmark) -> dict[str, Any]:
    return {
        "method": cfg.method.name,
        "model": cfg.model.name,
        "benchmark": cfg.benchmark.name,
        "objective": cfg.benchmark.get("objective", "classification"),
        "softmax": softmax(benchmark, cfg.benchmark.get("objective", "classification")),
        "replay": cfg.replay.name,
        "peft": cfg.peft.name,
        "batch": batch_record(cfg),
        "seed": cfg.seed,
        "split": cfg.evaluation.split,
        "signature": identity["signature"],
        "setting": identity["setting"],
        "inputs": {key: value for key, value in identity.items() if key not in ("signature", "setting", "seed")},
        "hub_data": {} if cfg.data_dir else hub_data(cfg.benchmark),
        "tasks": benchmark.names,
        "overrides": overrides,
        "versions": versions(),
        "git": git_revision(),
    }


def batch_record(cfg: DictConfig) -> dict[str, int]:
    """How the configured global batch is carried out: examples per forward pass, and passes per step."""
    whole, ranks = cfg.train.global_batch_size, world().size
    part = -(-whole // ranks)
    micro = min(part, cfg.hardware.micro_batch_size or part)
    return {"global": whole, "per_device": micro, "accumulation": -(-part // micro), "devices": ranks}
