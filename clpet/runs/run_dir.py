"""The run directory: files written at the start, during and at the end of a run, and the test for a finished one."""

import contextlib
import csv
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import TypedDict, cast

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from clpet.config.compose import plugin_dirs
from clpet.data.benchmark import Benchmark
from clpet.errors import DataError
from clpet.escape import inline, spreadsheet
from clpet.methods.base import Method
from clpet.metrics import perplexity_transfer
from clpet.metrics.transfer_matrix import TransferMatrix, on_split, tolist
from clpet.models.adapters import parameter_ratio
from clpet.records import (
    FAILURE,
    Cost,
    DataRecord,
    Description,
    ExtendedFrom,
    Headline,
    PerplexityTransfer,
    Results,
    State,
)
from clpet.runs.provenance import git_revision, hub_data, versions
from clpet.runtime.atomic_io import replace_folder, write_text
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import NOT_RECORDED
from clpet.runtime.run_checkpoint import RunState, write_tree
from clpet.runtime.untrusted_json import read_json, read_results


class _Validation(TypedDict, total=False):
    validation: dict[str, float]


class _ConfigDirs(TypedDict, total=False):
    config_dirs: list[str]


class _Extension(TypedDict, total=False):
    extended_from: ExtendedFrom


class _Pretraining(TypedDict, total=False):
    pretraining: PerplexityTransfer


log = logging.getLogger(__name__)

# What a run writes into its directory, next to Hydra's own files and train.log.
OUTPUT_PATTERNS = (
    "*.png", "*.jsonl", "*.csv", "run.json", "results.json", "report.html", "downstream-*.json", "mlflow-run.json",
    FAILURE,
)  # fmt: skip
BYTES_PER_TOKEN = 4  # of a stored example: a token id in 32 bits
OUTPUT_FOLDERS = ("state", "predictions", "adapters", "heads", "checkpoints", "wandb", "tensorboard")


def finished_results(out: Path) -> Results | None:
    """results.json of a finished run, else None. It is written last: if it exists, all other files are complete."""
    if not (out / "results.json").is_file():
        return None
    try:
        return read_results(out / "results.json")
    except DataError as error:
        log.warning("%s: results.json will be written again from the checkpoint", error)
        return None


def clear(out: Path) -> None:
    """Removes the outputs of an earlier run from its directory."""
    for pattern in OUTPUT_PATTERNS:
        for path in out.glob(pattern):
            path.unlink()
    for name in OUTPUT_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def softmax(benchmark: Benchmark) -> str | None:
    """Labels that compete in a classification loss, "task" or "seen": what benchmark.softmax=auto resolved to."""
    return ("task" if benchmark.per_task_softmax else "seen") if benchmark.traits.has_labels else None


def start(
    out: Path,
    cfg: DictConfig,
    overrides: list[str],
    identity: dict[str, str],
    benchmark: Benchmark,
    data: DataRecord,
    host: dict[str, str | int],
    resumes: bool = False,
    extended_from: ExtendedFrom | None = None,
) -> None:
    """Writes run.json: the resolved configuration, the data, the hardware (`host`, of Hardware.record), versions."""
    if resumes:
        _warn_of_rounding(out, host)
    (out / FAILURE).unlink(missing_ok=True)
    record = {
        **_description(cfg, overrides, identity, benchmark),
        **_extension(extended_from),
        "direction": benchmark.direction,
        "host": host,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "data": data,
    }
    write_text(out / "run.json", json.dumps(record, indent=1))


def _warn_of_rounding(out: Path, host: dict[str, str | int]) -> None:
    """Warns that a run started on hardware that rounds differently: resumed here, it will not end bit for bit equal."""
    try:
        before = read_json(out / "run.json").get("host")
    except DataError:
        return
    if not isinstance(before, dict):
        return
    before, now = {**NOT_RECORDED, **before}, {**NOT_RECORDED, **host}
    if other := [key for key in now if key != "name" and before.get(key, now[key]) != now[key]]:
        changes = ", ".join(f"{key} {before[key]}, now {now[key]}" for key in other)
        log.warning("the run began with %s: it ends equal to rounding, not bit for bit", inline(changes))


def collect(
    out: Path,
    cfg: DictConfig,
    overrides: list[str],
    identity: dict[str, str],
    method: Method,
    benchmark: Benchmark,
    data: DataRecord,
    state: RunState,
) -> Results:
    """Writes adapters, heads and transfer.csv; returns the contents of results.json, which `finish` writes."""
    method.save(out / "adapters")
    save_heads(method, out / "heads")
    write_text(out / "transfer.csv", transfer_csv(state.matrix, cfg.evaluation.split))
    validation: _Validation = {"validation": state.validation} if state.validation else {}
    return {
        **_description(cfg, overrides, identity, benchmark),
        **_extension(state.extended_from),
        **state.matrix.to_json(),
        "backward": tolist(state.matrix.backward),
        "forward": tolist(state.matrix.forward),
        "task_scores": tolist(state.task_matrix.scores),
        "task_backward": tolist(state.task_matrix.backward),
        "task_forward": tolist(state.task_matrix.forward),
        "task_id_at_test": method.task_id_at_test,
        "resolved": method.resolved(benchmark),
        "metric": benchmark.tasks[0].metric,
        **validation,
        "test_sets": benchmark.fingerprints(cfg.evaluation.split),
        **headline(state.matrix),
        "metrics": state.matrix.metrics(),
        "task_metrics": state.task_matrix.metrics(),
        **_pretraining(state.matrix, benchmark),
        "diagnostics": state.diagnostics,
        "parameters": parameter_ratio(method.trainable_parameters(), method.objective.adapters.base_parameters),
        "dropout": method.objective.adapters.dropout(),
        "cost": state.costs,
        "data": data,
    }


def save_heads(method: Method, folder: Path) -> None:
    """Writes every classification head as safetensors, with the names of its labels in the metadata."""
    folder.mkdir(exist_ok=True)
    names, labels = method.benchmark.names, method.benchmark.labels
    for name, head in method.heads().items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in head.named_parameters()}
        # The outputs of ConPET's task selector are tasks; those of every other head are labels.
        rows = [labels[label] for label in head.labels] if name != "selector" else names
        save_file(tensors, folder / f"{name}.safetensors", metadata={"labels": json.dumps(rows)})


def snapshot_folder(out: Path, row: int) -> Path:
    """Folder of the weights after the first `row` tasks."""
    return out / "checkpoints" / f"after-{row:03d}"


def save_snapshot(out: Path, row: int, method: Method, trainer: State) -> None:
    """Writes the weights after `row` tasks: adapters and heads as at the end, and the state of method and trainer."""
    state = method.state_dict()
    if method.objective.adapters.config is None:  # without PEFT adapters method.save already writes these weights
        state["objective"] = {**cast(State, state["objective"]), "adapters": {}}
    sharded, main = get_world().mesh is not None, get_world().is_main
    if not (sharded or main):
        return
    path = snapshot_folder(out, row)
    with replace_folder(path) if main else contextlib.nullcontext(path) as folder:
        method.save(folder)
        if main:
            save_heads(method, folder / "heads")
        write_tree(folder / "state", {"row": row, "method": state, "trainer": trainer})


def finish(out: Path, results: Results) -> None:
    """Writes results.json, as the last file: its presence marks the run as finished."""
    write_text(out / "results.json", json.dumps(_finite(results), indent=1, allow_nan=False))


def _finite(node: object) -> object:
    """Replaces NaN and infinity by None, since JSON cannot hold them; the sums behind a perplexity are stored too."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def headline(matrix: TransferMatrix) -> Headline:
    """The summary metrics at the top level of results.json, for scripts that read them by name."""
    return {
        "average": matrix.average(),
        "whole": matrix.micro_average(),
        "backward_transfer": matrix.backward_transfer(),
        "forward_transfer": matrix.forward_transfer(),
        "forgetting": matrix.forgetting(),
        "learning_accuracy": matrix.learning_accuracy(),
    }


def _pretraining(matrix: TransferMatrix, benchmark: Benchmark) -> _Pretraining:
    if matrix.direction == "higher":
        return {}
    return {"pretraining": perplexity_transfer.figures(matrix.scores, matrix.tasks, groups=benchmark.groups)}


def transfer_csv(matrix: TransferMatrix, split: str = "test") -> str:
    """The matrix as CSV: header after,<task>,...; rows 0 to T; an empty cell was not measured.

    If `split` is not test, the first header cell names it: "after (validation)".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([on_split("after", split), *map(spreadsheet, matrix.tasks)])
    for index, values in enumerate(matrix.scores):
        writer.writerow([index, *("" if v != v else repr(float(v)) for v in values)])
    return text.getvalue()


def task_cost(method: Method) -> Cost:
    """The cost of learning the last task, the number of trained parameters, and what the method stores by now."""
    parameters = {
        "trainable_parameters": method.trainable_parameters(),
        "stored_parameters": method.stored_parameters(),
    }
    rows, pool = method.stored_rows(), method.data.train
    replayed = {"replay_examples": len(rows), "replay_bytes": BYTES_PER_TOKEN * int(pool.lengths[rows].sum())}
    return cast(Cost, {**method.objective.meter.take_learning(), **parameters, **replayed})


def _description(cfg: DictConfig, overrides: list[str], identity: dict[str, str], benchmark: Benchmark) -> Description:
    """The keys that run.json and results.json share: what is run, on which inputs, with which versions."""
    return {
        "method": cfg.method.name,
        "model": cfg.model.name,
        "benchmark": cfg.benchmark.name,
        "objective": cfg.objective.name,
        "softmax": softmax(benchmark),
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
        **_config_dirs(),
        "versions": versions(),
        "git": git_revision(),
    }


def _extension(extended_from: ExtendedFrom | None) -> _Extension:
    return {"extended_from": extended_from} if extended_from else {}


def _config_dirs() -> _ConfigDirs:
    folders = [str(folder) for folder in plugin_dirs()]
    return {"config_dirs": folders} if folders else {}


def batch_record(cfg: DictConfig) -> dict[str, int]:
    """The split of the global batch: examples per forward pass and device, and forward passes per step."""
    global_batch, devices = cfg.train.global_batch_size, get_world().size
    per_device = -(-global_batch // devices)  # rounded up, as the trainer splits it
    micro = min(per_device, cfg.hardware.micro_batch_size or per_device)
    return {"global": global_batch, "per_device": micro, "accumulation": -(-per_device // micro), "devices": devices}
