"""Opens a run directory: reads its record, and loads its method with the weights after some task.

A run directory may come from an untrusted source: see `run_record.py`. Weights are loaded from safetensors, never from
pickle.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich.console import Console

from clpet.config.build import find_class, parse_config
from clpet.config.schema import OBJECT_GROUPS, Config
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.data.recorded_benchmark import recorded_benchmark
from clpet.data.sources import Source
from clpet.errors import ConfigError, DataError, enough_memory, suggest
from clpet.methods.base import Method
from clpet.models.backbone import Backbone
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import Objective
from clpet.records import Checkpoint, State
from clpet.replay.base import NoReplay
from clpet.reporting.progress import Display
from clpet.runs.provenance import inputs
from clpet.runs.run_dir import snapshot_folder
from clpet.runs.run_record import cache_dir, read_run_json
from clpet.runs.tracking_options import Tracking
from clpet.runtime.hardware import Hardware
from clpet.runtime.run_checkpoint import checkpoints, read_tree
from clpet.runtime.untrusted_json import as_data_error, read_results
from clpet.training.progress import NoProgress
from clpet.wiring import Components, Session

log = logging.getLogger(__name__)
# The class that each group's `_target_` must be, or inherit from.
_CLASSES = (Method, NoReplay, Backbone, FullFineTuning, Objective, Source, Hardware, Tracking)
BASE_CLASSES = dict(zip(OBJECT_GROUPS, _CLASSES, strict=True))
LOCATIONS = (
    "data_dir",
    "cache_dir",
    "model.path",
    "model.chat_template",
    "hardware.",
)  # options that depend on the machine, not on the run


@dataclass
class RunRecord:
    """The checked contents of run.json, with the objects built from its config; no data or weights are loaded yet."""

    out: Path
    config: Config
    run_json: dict[str, Any]
    components: Components

    @property
    def method(self) -> Method:
        """The method; not set up before `load_run`."""
        return self.components.method


@dataclass
class LoadedRun:
    """A method with its weights after `row` tasks, the benchmark, and the scores that were recorded in that row."""

    record: RunRecord
    session: Session
    row: int
    scores: list[float | None]  # one per task; None where not measured

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return self.session.benchmark

    @property
    def data(self) -> Encoded:
        """The tokenised splits of the benchmark."""
        return self.session.data

    @property
    def method(self) -> Method:
        """The method, with its weights loaded."""
        return self.session.method

    @property
    def split(self) -> str:
        """The split that the run's matrix was measured on."""
        return self.record.config.evaluation.split.value


def read_record(out: Path, overrides: Sequence[str] = (), plugins: bool = False) -> RunRecord:
    """Reads and checks run.json. Raises ConfigError and DataError.

    `overrides` are KEY=VALUE words for options in LOCATIONS, since files may be stored elsewhere by now. `plugins`
    allows the classes of a --config-dir and a model's remote code.
    """
    file = out / "run.json"
    run_json = read_run_json(out, plugins)
    with as_data_error(f"{file} does not describe a run"):
        cfg = OmegaConf.create(run_json["config"])
        OmegaConf.update(cfg, "cache_dir", cache_dir(out), force_add=True)
        for word in overrides:
            key, equals, value = word.partition("=")
            if not equals or not key.startswith(LOCATIONS):
                raise ConfigError(f"--here {word}: can only set {', '.join(LOCATIONS)}*{suggest(key, LOCATIONS)}")
            OmegaConf.update(cfg, key, value or None)
        config = parse_config(cfg)
        for group, base in BASE_CLASSES.items():
            target = str(getattr(config, group)["_target_"])
            if not issubclass(find_class(target, group), base):
                raise ConfigError(f"{group}._target_ names {target}, which is not a {base.__name__}")
        components = Components.build(config)
    return RunRecord(out, config, run_json, components)


def load_run(record: RunRecord, after: int | None = None, needs_data: bool = True) -> LoadedRun:
    """Loads the data, the backbone and the weights after `after` tasks (None: the newest). Raises DataError.

    Without `needs_data` the model is for new texts: where the run's data are gone or changed, what was recorded of
    their tasks and labels will do, with a warning, unless the method answers by its examples.
    """
    config, components, method = record.config, record.components, record.method
    benchmark = load_data(record, needs_data or method.reads_examples)
    with as_data_error(f"{record.out} cannot be loaded"), enough_memory(lambda: "the model of this run"):
        benchmark = components.settle(benchmark)
        if benchmark.base is not None:
            cache = Path(config.cache_dir or record.out.parent / ".cache")
            display = Display(Console(stderr=True), 0)
            components = components.with_base_model(benchmark, cache, record.out, display)
            record = replace(record, components=components)
        check_inputs(record)
        session = Session.assemble(components, benchmark, NoProgress())
        row, folder = find_weights(record, after)
        if folder:
            state = read_weights(folder)
            if folder.name == "state":  # a snapshot: its model or adapters are in files next to the state
                method.objective.adapters.load_saved(folder.parent)
            method.load_state_dict(state)
        return LoadedRun(record, session, row, recorded_scores(record.out, row, len(benchmark)))


def load_data(record: RunRecord, needs_data: bool) -> Benchmark:
    """The run's benchmark, or without `needs_data` perhaps one without its examples. Raises DataError."""
    source, data = record.components.source, record.run_json["data"]
    try:
        benchmark = source.load(record.config.data_dir)
        now, before = benchmark.fingerprint(), data["fingerprint"]
        if benchmark.names != record.run_json["tasks"] or now != before:
            raise DataError(f"the data differ from those of {record.out} (fingerprint {before}, now {now})")
    except DataError as error:
        with as_data_error(f"{record.out / 'run.json'} does not describe the data of a run"):
            recorded = None if needs_data else recorded_benchmark(source, record.run_json["tasks"], data)
        if recorded is None:
            remedy = "say where they are with --here data_dir=PATH (in Python: data_dir=PATH)"
            raise DataError(f"{error}: {remedy}") from error
        log.warning("%s; tasks and labels are those of its record", error)
        return recorded
    for note in benchmark.report.notes():
        log.warning(note)
    return benchmark


def check_inputs(record: RunRecord) -> None:
    """Raises DataError if the run read other weights than are there now; changed plugin code only gives a warning."""
    current = inputs(record.config, record.components.backbone, record.method)
    for name, before in record.run_json.get("inputs", {}).items():
        if (now := current.get(name, before)) == before:
            continue
        if name != "code":
            raise DataError(
                f"the {name} differ from those of {record.out} ({before}, now {now}): "
                "give the folder of the model with --here model.path=FOLDER (in Python without --here)"
            )
        log.warning(
            "the code of your own classes has changed since %s was trained (%s, now %s)", record.out, before, now
        )


def find_weights(record: RunRecord, after: int | None) -> tuple[int, Path | None]:
    """(number of learned tasks, folder of the weights; None before the first task). Raises DataError.

    Snapshots in checkpoints/ cover every train.snapshot_every-th task, state/ the newest one or two.
    """
    rows = [0, *(index + 1 for index, _ in record.method.curriculum())]
    folders: dict[int, Path | None] = {0: None}
    for row in rows[1:]:
        if (folder := snapshot_folder(record.out, row) / "state").is_dir():
            folders[row] = folder
    for folder in checkpoints(record.out / "state"):
        if folder.name.isdigit() and 0 < int(folder.name) < len(rows):
            folders[rows[int(folder.name)]] = folder
    if after is None:
        if len(folders) == 1:
            raise DataError(f"{record.out} has not learned any task yet")
        after = max(folders)
    if after not in folders:
        available = ", ".join(map(str, sorted(folders)))
        raise DataError(
            f"{record.out} has no weights after {after} tasks, only after {available}; "
            "train.snapshot_every=1 would have saved all of them"
        )
    return after, folders[after]


def read_weights(folder: Path) -> State:
    """The method's state dict in a checkpoint. Raises DataError."""
    try:
        return cast(State, read_tree(folder)["method"])
    except ValueError as error:
        raise DataError(str(error)) from error


def recorded_scores(out: Path, row: int, num_tasks: int) -> list[float | None]:
    """Row `row` of the transfer matrix from results.json, or from the newest checkpoint of an unfinished run."""
    if (out / "results.json").is_file():
        return read_results(out / "results.json")["scores"][row]
    for folder in reversed(checkpoints(out / "state")):
        try:
            scores = cast(Checkpoint, read_tree(folder))["matrix"]["scores"]
            return [None if value is None else float(value) for value in scores[row]]
        except ValueError:  # damaged: try the one before
            continue
    return [None] * num_tasks
