"""A run directory opened again: its method with the weights it had after some task.

The directory may come from anywhere. What run.json says is data: it names classes of clpet and of nothing else, it has
nothing resolved (an interpolation could read the environment), nothing is written where it says, and weights are
safetensors.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from clpet.base_model import prepare
from clpet.config.build import find_class, typed
from clpet.config.schema import GROUPS, Config
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.data.sources import Source
from clpet.errors import ConfigError, DataError, enough_memory, suggest
from clpet.methods.base import Method
from clpet.models.adapters import Adapter
from clpet.models.backbone import Backbone
from clpet.replay.base import NoReplay
from clpet.reporting.progress import Display
from clpet.runs.provenance import inputs
from clpet.runs.run_dir import snapshot_folder
from clpet.runs.tracking import Tracking
from clpet.runtime.hardware import Hardware
from clpet.runtime.run_checkpoint import checkpoints, read_tree
from clpet.runtime.untrusted_json import check, read_json, read_results, readable
from clpet.session import assemble, load_objective

log = logging.getLogger(__name__)
KINDS = dict(
    zip(GROUPS, (Method, NoReplay, Backbone, Adapter, Source, Hardware, Tracking), strict=True)
)  # what each group's class must be
HERE = ("data_dir", "cache_dir", "model.path", "hardware.")  # where things lie, which may be elsewhere now
NAME = re.compile(r"[^\x00-\x1f]+")  # of a task
FOLDERS = ("benchmark.tasks", "benchmark.folders", "benchmark.domains")  # may become parts of a path
HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass
class Recorded:
    """What a run directory says of itself, checked, before anything is loaded."""

    out: Path
    config: Config
    record: dict[str, Any]
    parts: dict[str, Any]
    method: Method

    @property
    def objective(self) -> str:
        """Name of what the model was asked to do."""
        return self.parts["benchmark"].objective.value


@dataclass
class Reopened:
    """A method as it was after `row` tasks, its test data, and the row of the matrix that was recorded then."""

    run: Recorded
    benchmark: Benchmark
    data: Encoded
    row: int
    scores: list[float | None]

    @property
    def method(self) -> Method:
        """With its weights."""
        return self.run.method

    @property
    def split(self) -> str:
        """What its matrix is measured on."""
        return self.run.config.evaluation.split.value


def recorded(out: Path, here: Sequence[str] = (), plugins: bool = False) -> Recorded:
    """Reads run.json; `here` are key=value words for what lies elsewhere now. Raises ConfigError and DataError.

    With `plugins` the classes of a --config-dir and a model's remote code are allowed.
    """
    if not (out / "run.json").is_file():
        raise DataError(f"{out} is not a run directory: no run.json there")
    record = read_json(out / "run.json")
    shape = {"config": dict, "tasks": [str], "data": {"fingerprint": str}}
    check(record, shape | ({"inputs": {str: str}} if "inputs" in record else {}), f"{out / 'run.json'}")
    inspect(record["config"], plugins, "")
    for name in record["tasks"]:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{out / 'run.json'}: {name!r} is no name of a task")
    with readable(f"{out / 'run.json'} does not describe a run"):
        cfg = OmegaConf.create(record["config"])
        root = out.resolve().parents[2:3]
        cache = next((str(folder / ".cache") for folder in root if (folder / ".cache").is_dir()), None)
        OmegaConf.update(cfg, "cache_dir", cache, force_add=True)
        for word in here:
            key, equals, value = word.partition("=")
            if not equals or not key.startswith(HERE):
                raise ConfigError(f"{word}: only what may lie elsewhere can be said{suggest(key, HERE)}")
            OmegaConf.update(cfg, key, value or None)
        config = typed(cfg)
        for group, kind in KINDS.items():
            target = str(getattr(config, group)["_target_"])
            if not issubclass(find_class(target, group), kind):
                raise ConfigError(f"{group}._target_ names {target}, which is no {kind.__name__}")
        method, parts = assemble(config)
    return Recorded(out, config, record, parts, method)


def inspect(node: Any, plugins: bool, where: str) -> None:
    """Raises ConfigError for what a recorded config may not say; turns remote code off, unless `plugins`."""
    if isinstance(node, dict):
        if not plugins and "trust_remote_code" in node:
            node["trust_remote_code"] = False
        for key, value in node.items():
            inspect(value, plugins, f"{where}.{key}".lstrip("."))
        for key in ("encoder", "order_encoder"):  # a name, a hub id or a folder
            if ".." in str(node.get(key)).split("/"):
                raise ConfigError(
                    f"{where}.{key} names {str(node[key])[:80]!r}, which is no name, hub id or whole path"
                )
        hub, target = node.get("hub"), node.get("_target_", "clpet.")
        if hub is not None and not (isinstance(hub, str) and HUB.fullmatch(hub)):
            raise ConfigError(f"{where}.hub names {str(hub)[:80]!r}, which is no hub id")
        if not (isinstance(target, str) and (plugins or re.fullmatch(r"clpet\.[\w.]*", target))):
            hint = "with --allow-plugins and --config-dir FOLDER, if you trust this run, your own classes are allowed"
            raise ConfigError(f"{where}._target_ names {str(target)[:80]}, which is no part of clpet: {hint}")
    elif isinstance(node, list):
        for item in node:
            inspect(item, plugins, where)
            if where in FOLDERS and not inside(str(item)):
                raise ConfigError(f"{where}: {item!r} does not name a folder below data_dir")
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(f"{where} holds ${{...}}: a recorded configuration is resolved")


def inside(name: str) -> bool:
    """Whether a recorded name, taken as a path, stays inside the folder that it is looked for in."""
    return bool(NAME.fullmatch(name)) and not Path(name).is_absolute() and ".." not in re.split(r"[/\\]", name)


def reopen(run: Recorded, after: int | None = None) -> Reopened:
    """Loads the data, the backbone and the weights after `after` tasks (None: the newest). Raises DataError."""
    config, parts, method = run.config, run.parts, run.method
    benchmark: Benchmark = parts["benchmark"].load(config.data_dir)
    for note in benchmark.report.notes():
        log.warning(note)
    there, wanted = benchmark.fingerprint(), run.record["data"]["fingerprint"]
    if benchmark.names != run.record["tasks"] or there != wanted:
        raise DataError(
            f"the data of {run.out} were others (fingerprint {wanted}, here {there}): say --here data_dir=FOLDER"
        )
    with readable(f"{run.out} cannot be opened again"), enough_memory(lambda: "the model of this run"):
        method.check_benchmark(benchmark)
        if benchmark.base is not None and parts["model"].random_weights:
            cache = Path(config.cache_dir or run.out.parent / ".cache")
            prepare(parts["model"], benchmark, parts["hardware"], cache, run.out, Display(Console(stderr=True), 0))
        check_inputs(run)
        objective, data = load_objective(config, parts, benchmark)
        parts["replay"].setup(data, config.seed, config.train.global_batch_size)
        method.setup(objective, benchmark, data, parts["replay"], config.seed)
        row, folder = place(run, after)
        if folder:
            state = weights(folder)
            if folder.name == "state":
                objective.adapters.load_saved(folder.parent)
            method.load_state_dict(state)
        return Reopened(run, benchmark, data, row, scores(run.out, row, len(benchmark)))


def check_inputs(run: Recorded) -> None:
    """Raises DataError where the run read other weights than are there now; other code of one's own is warned of."""
    there = inputs(run.config, run.parts["model"], run.method)
    for name, was in run.record.get("inputs", {}).items():
        if (now := there.get(name, was)) == was:
            continue
        if name != "code":
            raise DataError(f"the {name} of {run.out} were others ({was}, here {now}): say --here model.path=FOLDER")
        log.warning("%s was trained by other code of yours (%s, here %s)", run.out, was, now)


def place(run: Recorded, after: int | None) -> tuple[int, Path | None]:
    """(tasks learned, folder of the weights; None where nothing was learned). Raises DataError."""
    rows = [0, *(index + 1 for index, _ in run.method.curriculum())]
    found: dict[int, Path | None] = {0: None}
    for row in rows[1:]:
        if (folder := snapshot_folder(run.out, row) / "state").is_dir():
            found[row] = folder
    for folder in checkpoints(run.out / "state"):
        if folder.name.isdigit() and 0 < int(folder.name) < len(rows):
            found[rows[int(folder.name)]] = folder
    if after is None:
        if len(found) == 1:
            raise DataError(f"{run.out} has learned no task yet")
        after = max(found)
    if after not in found:
        there = ", ".join(map(str, sorted(found)))
        raise DataError(f"{run.out} keeps no weights after {after} tasks, but after {there}: see train.keep")
    return after, found[after]


def weights(folder: Path) -> dict[str, Any]:
    """The method's state in a checkpoint. Raises DataError."""
    try:
        return read_tree(folder)["method"]
    except ValueError as error:
        raise DataError(str(error)) from error


def scores(out: Path, row: int, tasks: int) -> list[float | None]:
    """What was recorded of a row: in results.json, or in an unfinished run's newest checkpoint."""
    if (out / "results.json").is_file():
        return read_results(out / "results.json")["scores"][row]
    for folder in reversed(checkpoints(out / "state")):
        try:
            return [None if value is None else float(value) for value in read_tree(folder)["matrix"]["scores"][row]]
        except ValueError:
            continue
    return [None] * tasks
