"""Extension: a run takes over its first tasks from a finished run, instead of learning them again.

What a run has learned after k tasks depends on these tasks alone, so the extended run ends as if it had learned all of
its tasks itself. Whatever would make a difference is refused here with its reason: other settings, other data of a
task, a method or schedule that depends on the number of tasks, a state or a row of the matrix that was not kept.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from clpet.config.compose import plugin_dirs
from clpet.config.identity import differences
from clpet.config.schema import Config, Schedule
from clpet.data.benchmark import Benchmark
from clpet.errors import ClpetError, ConfigError, DataError
from clpet.escape import safe_name, short_repr
from clpet.methods.base import Method
from clpet.records import DataRecord, ExtendedFrom, Json, Results, State, TaskRecord
from clpet.runs.planning import measured_tasks
from clpet.runs.run_dir import snapshot_folder
from clpet.runs.run_record import read_run_json
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import checkpoints, read_tree
from clpet.runtime.untrusted_json import as_data_error, read_json, read_results
from clpet.wiring import Components, Session

AUTO, OFF = "auto", "off"  # values of the option `extend`; any other one is the folder of a run
COUNTS = ("train", "validation", "test", "labels")  # of a task, for the message that its data differ
MAY_CHANGE = ("evaluation.matrix",)  # fewer cells of the matrix can be taken over from a run that has measured more


@dataclass(frozen=True)
class Extension:
    """What a run takes over from the finished run `base`: the state after its first `learned` tasks.

    `states` has the folders of kept weights by the number of tasks, as far as rows are measured with them; rows in
    `copied` are not measured again. `explicit`: the user has named the run, so nothing else will do.
    """

    base: Path
    tasks: list[str]
    learned: int
    states: dict[int, Path]
    copied: tuple[int, ...]
    results: Results
    data: DataRecord
    inputs: Mapping[str, str] = field(default_factory=dict)
    explicit: bool = False

    def record(self) -> ExtendedFrom:
        """The extension as plain values, for run.json and results.json."""
        return {
            "run": str(self.base),
            "tasks": self.tasks[: self.learned],
            "state": str(self.states[self.learned].relative_to(self.base)),
            "copied_rows": list(self.copied),
        }

    def line(self) -> str:
        """What is reused, for the screen."""
        tasks = ", ".join(map(safe_name, self.tasks[: self.learned]))
        return f"extends {self.base}: {tasks} not learned again ({self.states[self.learned].relative_to(self.base)})"

    def check(self, session: Session, identity: Mapping[str, str]) -> None:
        """Raises ConfigError if weights, code, lengths or automatic options are not those of the base run."""
        for name, before in self.inputs.items():
            if name != "data" and (now := identity.get(name, before)) != before:
                raise refusal(self.base, f"its {name} were {before}, now they are {now}")
        for key in ("max_length", "max_target"):
            length = self.data.get(key)
            if length is not None and length != session.data_record.get(key):
                advice = "a shorter benchmark.max_length leaves room for later tasks from the start"
                cut = f"it has cut texts at {key}={length} tokens, now {session.data_record.get(key)}"
                raise refusal(self.base, f"{cut}: {advice}")
        resolved = session.method.resolved(session.benchmark)
        for option, value in self.results.get("resolved", {}).items():
            if option in resolved and resolved[option] != value:
                advice = "it is chosen from all tasks, unless it is set from the start"
                raise refusal(self.base, f"it has {option}={value}, now {resolved[option]}: {advice}")

    def load(self, row: int, method: Method) -> State:
        """Loads the method's state after `row` tasks; returns that of the trainer. Raises DataError."""
        folder = self.states[row]
        try:
            tree = read_tree(folder)
        except ValueError as error:
            raise DataError(str(error)) from error
        with as_data_error(f"{folder} cannot be loaded"):
            if folder.name == "state":  # a snapshot: a fully trained model is in files next to its state
                method.objective.adapters.load_saved(folder.parent)
            method.load_state_dict(cast(State, tree["method"]))
        return cast(State, tree.get("trainer") or {})


def refusal(base: Path, reason: str) -> ConfigError:
    """The error for a run that cannot be extended."""
    return ConfigError(f"cannot extend {base}: {reason} (extend=off learns all tasks)")


def find_extension(
    cfg: DictConfig, config: Config, out: Path, components: Components, benchmark: Benchmark
) -> tuple[Extension | None, str]:
    """The extension that `extend` asks for, and a line about it, '' if there is nothing to say.

    A run with a state of its own resumes from it instead. Raises ConfigError and DataError if a run that the user has
    named cannot be extended; with extend=auto the line says why.
    """
    choice = config.extend.strip()
    resumes = bool(checkpoints(out / "state")) and not config.fresh
    if resumes or choice == OFF or (choice == AUTO and config.fresh):
        return None, ""
    examine = Examination(cfg, config, components.method, benchmark)
    if choice != AUTO:
        if Path(choice).expanduser().resolve() == out.resolve():
            raise refusal(
                Path(choice), "it has the same tasks and settings, so it is this run; fresh=true alone repeats it"
            )
        named = replace(examine(Path(choice)), explicit=True)
        return named, named.line()
    extension, line = _search(examine, out)
    # All ranks take the run that the main one has found: another process may have finished one in the meantime.
    path = get_world().gather(extension.base if extension else None)[0]
    if extension is None or path != extension.base:
        extension = examine(path) if path else None
    return extension, extension.line() if extension else line


def _search(examine: "Examination", out: Path) -> tuple[Extension | None, str]:
    """The run next to `out` from which most can be taken over; if there is none, why the most similar one cannot."""
    best: Extension | None = None
    line, most = "", 0
    for base, common in examine.candidates(out):
        try:
            extension = examine(base)
        except ClpetError as error:
            line, most = (f"note: {error}", common) if common > most else (line, most)
            continue
        if best is None or extension.learned > best.learned:
            best = extension
    return best, line


@dataclass(frozen=True)
class Examination:
    """Examines whether and how the run of a configuration can extend other runs."""

    cfg: DictConfig
    config: Config
    method: Method
    benchmark: Benchmark

    def candidates(self, out: Path) -> Iterator[tuple[Path, int]]:
        """(run, number of common first tasks) of the finished runs next to `out` that differ in the tasks alone."""
        folder = Path(*(name for name in out.parent.parts if name != ".dry"))
        for base in sorted(folder.glob(f"s{self.config.seed}-*")):
            if base.name == out.name or not (base / "results.json").is_file():
                continue
            try:
                common = self.common(cast(list[str], read_json(base / "run.json").get("tasks")))
                with as_data_error(f"{base} cannot be compared"):
                    same = bool(common) and not differences(_recorded(base)[0], self.cfg)
            except (ClpetError, OSError, TypeError):
                continue
            if same:
                yield base, common

    def common(self, tasks: Sequence[str]) -> int:
        """Number of first tasks that a run on `tasks` has in common with this one."""
        pairs = zip(tasks, self.benchmark.names, strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(tasks), len(self.benchmark)))

    def __call__(self, base: Path) -> Extension:
        """What can be taken over from `base`. Raises ConfigError and DataError with the reason if nothing can."""
        if not (base / "results.json").is_file() and (base / "run.json").is_file():
            raise refusal(base, "it is not finished; its own command resumes it")
        recorded, data, inputs = _recorded(base)
        results = read_results(base / "results.json")
        with as_data_error(f"{base / 'run.json'} does not describe a run"):
            changed = {key: pair for key, pair in differences(recorded, self.cfg).items() if key not in MAY_CHANGE}
        if changed:
            listed = ", ".join(f"{key} was {short_repr(a)}, now {short_repr(b)}" for key, (a, b) in changed.items())
            raise refusal(base, f"only the tasks may differ, but {listed}")
        common = self.common(results["tasks"])
        if not common:
            raise refusal(base, f"its first task is {safe_name(results['tasks'][0])}, which is not the first one here")
        with as_data_error(f"{base / 'run.json'} does not describe a run"):
            self.check_data(base, data, results["tasks"], common)
        return self.longest(Extension(base, results["tasks"], 0, kept_states(base), (), results, data, inputs), common)

    def check_data(self, base: Path, data: DataRecord, tasks: list[str], common: int) -> None:
        """Raises ConfigError if one of the first `common` tasks has other labels or examples now."""
        records = cast(Mapping[str, TaskRecord], data["tasks"])
        first = replace(self.benchmark, tasks=self.benchmark.tasks[:common])
        if common == len(tasks) and first.fingerprint() == data["fingerprint"] and self._same_labels(data, first):
            return
        for task in first.tasks:
            before = records[task.name].get("data_fingerprint")
            if before is None:
                reason = (
                    "it was recorded without fingerprints of single tasks, and its data as a whole are not the same"
                )
                raise refusal(base, reason)
            if before != self.benchmark.task_fingerprint(task):
                splits = {name: len(task.split(name)) for name in COUNTS[:3]} | {"labels": len(task.labels)}
                counts = [(name, records[task.name].get(name), splits[name]) for name in COUNTS]
                listed = ", ".join(f"{name} {a}, now {b}" for name, a, b in counts if a not in (None, b))
                listed = listed or "the same numbers, other texts or targets"
                advice = "new examples or labels can be a new task"
                raise refusal(base, f"task {safe_name(task.name)} has other data ({listed}): {advice}")
        if not self._same_labels(data, first):
            raise refusal(base, "the labels of its tasks have other names now")

    def _same_labels(self, data: DataRecord, first: Benchmark) -> bool:
        return data["labels"][: len(first.labels)] == first.labels

    def longest(self, extension: Extension, common: int) -> Extension:
        """The extension by as many of the first `common` tasks as possible. Raises ConfigError if it is none."""
        limit, names = min(common, len(self.benchmark) - 1), self.benchmark.names
        if limit == 0:
            raise refusal(extension.base, f"there is no task after {safe_name(names[0])}")
        reasons = []
        for learned in range(limit, 0, -1):
            if reason := self.obstacle(extension, learned):
                reasons.append(reason)
                continue
            rows = range(learned + 1)
            missing = [row for row in rows if self.row(extension, row) is None]
            if not missing:
                copied = tuple(row for row in rows if self.row(extension, row))
                return replace(extension, learned=learned, copied=copied)
            reasons.append(
                f"row {missing[0]} of the matrix needs the weights after {missing[0]} of its tasks, which it has not "
                "kept: set evaluation.matrix=seen, or keep them with train.snapshot_every=1"
            )
        raise refusal(extension.base, reasons[0])

    def obstacle(self, extension: Extension, learned: int) -> str:
        """Why training cannot continue after the first `learned` tasks; '' if it can."""
        before = len(extension.tasks)
        if tied := self.method.tied_to_later_tasks(learned, before, len(self.benchmark)):
            return f"method={self.method.name}: {tied}"
        if self.config.train.schedule is Schedule.infinite and learned == before:
            return "train.schedule=infinite has ended with its last task"
        if learned not in extension.states or not _trainer_kept(extension.states[learned]):
            order = ", ".join(map(safe_name, extension.tasks))
            return (
                f"it has kept no state after {learned} of its {before} tasks, which are {order} in this order; "
                "train.snapshot_every=1 keeps all"
            )
        return ""

    def row(self, extension: Extension, row: int) -> bool | None:
        """True if row `row` of the matrix can be copied, False if it is measured again, None if neither is possible.

        A row is copied if the same tasks were measured: examples are predicted in batches that mix tasks, and another
        batch rounds differently.
        """
        scores = extension.results["scores"][row]
        before = [name for name, score in zip(extension.tasks, scores, strict=True) if score is not None]
        tasks = measured_tasks(self.config.evaluation, self.method, len(self.benchmark), row)
        now = [self.benchmark.names[index] for index in tasks]
        by_all_tasks = self.config.evaluation.rank_prompts > 0  # the texts of this metric are those of all tasks
        if not now or (before == now and not (by_all_tasks or self.method.rounds_with_unseen_labels)):
            return True
        if row == 0 or row in extension.states:
            return False
        return True if set(now) <= set(before) and not by_all_tasks else None


def kept_states(base: Path) -> dict[int, Path]:
    """{number of learned tasks: folder of the weights} of a run, without row 0."""
    folders = [path for path in (base / "checkpoints").glob("after-*") if re.fullmatch(r"after-[0-9]{3}", path.name)]
    snapshots = {int(folder.name.removeprefix("after-")): folder for folder in folders}
    states = {row: snapshot_folder(base, row) / "state" for row in sorted(snapshots)}
    newest = {int(folder.name): folder for folder in checkpoints(base / "state") if folder.name.isdigit()}
    return {row: folder for row, folder in {**states, **newest}.items() if row and folder.is_dir()}


def _trainer_kept(folder: Path) -> bool:
    """Whether training can continue from a state: snapshots of older versions lack what the trainer needs."""
    try:
        return "trainer" in json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return False


def _recorded(base: Path) -> tuple[DictConfig, DataRecord, Mapping[str, str]]:
    """The configuration of a run, the description of its data, and the fingerprints of its inputs."""
    run_json = read_run_json(base, plugins=bool(plugin_dirs()))
    inputs: Mapping[str, str] = run_json.get("inputs", {})
    return OmegaConf.create(cast(dict[str, Json], run_json["config"])), cast(DataRecord, run_json["data"]), inputs
