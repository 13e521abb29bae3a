"""Finished runs sorted for comparison: sections of what may be compared, and rows of runs that differ in their seed."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from clpet.config import NOT_IDENTITY, digest
from clpet.errors import ConfigError, suggest
from clpet.reading import read_json, split_of

T = TypeVar("T")
Group = list[tuple[Path, dict[str, Any]]]
NAMES = ("method", "model", "benchmark", "replay", "peft", "seed")  # keys that name a group option, and the seed
GIVEN = "task_id_at_test"  # whether the task is given at test: an easier question
SPLIT = "evaluation.split"
WRITING = ("train.save_minutes", "train.keep")  # when something is written changes no result


@dataclass
class Row:
    """Runs that differ in their seed only, with their options; `columns` are the options that are shown."""

    options: dict[str, str]
    runs: Group
    columns: dict[str, str] = field(default_factory=dict)
    chosen_by: Group = field(default_factory=list)  # the validation runs of a row that was chosen on validation
    tried: int = 0  # settings that it was chosen from

    @property
    def evidence(self) -> Group:
        """Its runs, or, where there are none yet, those it was chosen by."""
        return self.runs or self.chosen_by

    @property
    def name(self) -> str:
        """What the row is called in a test or a note."""
        return ", ".join(self.cells)

    @property
    def cells(self) -> list[str]:
        """The values of its columns, as a reader sees them."""
        marked = "method" if "method" in self.columns else next(iter(self.columns))
        note = {marked: " (task given)"} if self.given else {}
        return [f"{value}{note.get(key, '')}" for key, value in self.columns.items()]

    @property
    def given(self) -> bool:
        """Whether the task is given at test."""
        return self.options[GIVEN] == "True"


@dataclass
class Section:
    """What may stand in one table: rows of one benchmark, objective, metric and split, and of the same data.

    `keys` are the options that are compared; `runs` hold the reference runs of the rows as well.
    """

    benchmark: str
    objective: str
    metric: str
    direction: str
    split: str
    data: str
    keys: list[str]
    rows: list[Row]
    runs: Group
    left_out: list[str] = field(default_factory=list)  # test rows whose values have no runs on validation

    @property
    def lower(self) -> bool:
        """Whether lower scores are better."""
        return self.direction == "lower"

    def alike(self, other: "Section") -> bool:
        """Whether only the split tells two sections apart."""
        return replace(self, split="", rows=[], runs=[]) == replace(other, split="", rows=[], runs=[])

    def values(self, row: Row) -> tuple[str, ...]:
        """What rows are compared by."""
        return *values_of(row.options, self.keys), row.options[GIVEN]

    @property
    def columns(self) -> list[str]:
        """The options that are shown: those compared, and those in which rows of equal values differ."""
        return list(self.rows[0].columns)

    @property
    def others(self) -> list[str]:
        """Further options in which rows differ."""
        return [key for key in differing(self.rows) if key not in self.columns]


def options_of(path: Path, run: dict[str, Any]) -> dict[str, str]:
    """{dotted key: value} of a run's configuration, with what it resolved and the names of its group options."""
    record = read_json(path / "run.json")
    found = flat(record.get("config"))
    found |= {key: str(run[key]) for key in NAMES}
    if run.get("softmax"):  # as benchmark.softmax=auto was resolved
        found["benchmark.softmax"] = str(run["softmax"])
    return {**found, GIVEN: str(run["task_id_at_test"]), SPLIT: split_of(run)}


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value} of a configuration."""
    if not isinstance(node, dict):
        return {prefix: str(node)}
    inner = (flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in inner for key, value in part.items()}


def value_of(options: dict[str, str], key: str) -> str | None:
    """An option's value; of a key above several options all of them; None where there is none."""
    if key in options:
        return options[key]
    inner = {name: value for name, value in options.items() if name.startswith(f"{key}.")}
    return ", ".join(f"{name.removeprefix(f'{key}.')}={value}" for name, value in inner.items()) or None


def fingerprint(run: dict[str, Any]) -> str:
    """Hash of the data of a run."""
    return str(run.get("data", {}).get("fingerprint", ""))


def same_tests(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs of one split are measured on equal examples of equal tasks, by their recorded hashes."""
    known = a.get("test_sets") if "test_sets" in b else None
    return known == b["test_sets"] if known else bool(fingerprint(a)) and fingerprint(a) == fingerprint(b)


def sections(runs: Group, keys: list[str]) -> list[Section]:
    """The tables of a comparison by `keys`, each with its rows in order.

    Runs on other data are in another section, unless options of the benchmark are what is compared. Raises
    ConfigError for a key that no run has.
    """
    own_data = not any(key.startswith("benchmark.") or key == "data_dir" for key in keys)
    described = [((path, run), options_of(path, run)) for path, run in runs]
    for key in keys:
        if all(value_of(options, key) is None for _, options in described):
            known = {name for _, options in described for name in options}
            raise ConfigError(f"no run has the option {key} in its configuration{suggest(key, known)}")
    found = []
    for kind, part in _by(described, lambda one: _kind(one[0][1], one[1], own_data)).items():
        alike = _by(part, lambda one: (one[0][1]["signature"], fingerprint(one[0][1]), *values_of(one[1], keys)))
        rows = [Row(group[0][1], [run for run, _ in group]) for group in alike.values()]
        benchmark, objective, metric, direction, split, data = kind
        every = [run for run, _ in part]
        found.append(Section(benchmark, objective, metric, direction, split, data, keys, arranged(rows, keys), every))
    return sorted(found, key=lambda section: (section.benchmark, section.split != "test"))


def _kind(run: dict[str, Any], options: dict[str, str], own_data: bool) -> tuple[str, str, str, str, str, str]:
    lower = run["direction"] == "lower"
    objective = str(run.get("objective") or ("language_modeling" if lower else "classification"))
    metric = str(run.get("metric") or ("perplexity" if lower else "accuracy"))
    if objective == "text_to_text" and (
        own := value_of(options, "benchmark.metrics")
    ):  # of tasks that have another one
        metric += f" ({own})"
    return run["benchmark"], objective, metric, run["direction"], split_of(run), fingerprint(run) if own_data else ""


def on_validation(found: Sequence[Section], best: Callable[[Section, list[Row]], Row | None]) -> list[Section]:
    """Per section of validation runs the test runs of the settings chosen there; `best` chooses one of several rows.

    Rows compete that have the same values of the compared keys. A row whose setting was not run on test has no runs.
    """
    chosen = []
    for section in found:
        if section.split != "test":
            twin = next((other for other in found if other.split == "test" and other.alike(section)), None)
            tests = {recipe(row): row.runs for row in twin.rows} if twin else {}
            parts = _by(section.rows, section.values)
            rows = [
                Row(row.options, tests.get(recipe(row), []), chosen_by=row.runs, tried=len(part))
                for part in parts.values()
                if (row := best(section, part))
            ]
            left_out = [row.name for row in (twin.rows if twin else []) if section.values(row) not in parts]
            pool = twin.runs if twin else []
            made = replace(section, split="test", rows=arranged(rows, section.keys), runs=pool, left_out=left_out)
            chosen += [made] if rows else []
    return chosen


def recipe(row: Row) -> tuple[Any, ...]:
    """What a run learns and how, whichever split it is measured on."""
    kept = {key: value for key, value in row.options.items() if _identifies(key) and key != SPLIT}
    return tuple(sorted(kept.items())), {fingerprint(run) for _, run in row.evidence}.pop()


def _by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def values_of(options: dict[str, str], keys: Sequence[str]) -> tuple[str, ...]:
    """The values of several keys, - for what a run does not have."""
    return tuple(value_of(options, key) or "-" for key in keys)


def arranged(rows: list[Row], keys: Sequence[str]) -> list[Row]:
    """The rows, with their columns: the keys, and what it takes to tell rows of equal values apart; sorted by them."""
    columns = list(keys)
    while equal := _equal(rows, columns):
        new = [key for part in equal for key in differing(part) if key not in columns]
        if not new:
            break
        columns.append(new[0])
    for row in rows:
        row.columns = dict(zip(columns, values_of(row.options, columns), strict=True))
        if equal:  # the configuration does not say what tells them apart
            _, run = row.evidence[0]
            row.columns["run"] = digest([run["signature"], fingerprint(run)])
    return sorted(rows, key=lambda row: [natural(value) for value in row.columns.values()])


def _equal(rows: list[Row], columns: Sequence[str]) -> list[list[Row]]:
    """Rows that the columns do not tell apart."""
    return [part for part in _by(rows, lambda row: values_of(row.options, columns)).values() if len(part) > 1]


def differing(rows: Sequence[Row]) -> list[str]:
    """Options in which rows differ, in the order of the configuration; of another group option its name alone."""
    keys = dict.fromkeys(key for row in rows for key in row.options)
    differ = [key for key in keys if len({row.options.get(key) for row in rows}) > 1]
    named = [key for key in NAMES if key in differ and key != "seed"]
    return [*named, *(key for key in differ if _identifies(key) and key.partition(".")[0] not in named)]


def _identifies(key: str) -> bool:
    """Whether an option is part of what a run is, and not the name of a group."""
    return key.partition(".")[0] not in NOT_IDENTITY and key not in (*WRITING, *NAMES, GIVEN)


def natural(value: str) -> tuple[int, float, str]:
    """What values are sorted by: numbers by size, then words by letters, then what is not there."""
    try:
        return 0, float(value), ""
    except ValueError:
        return (2 if value in ("-", "None") else 1), 0.0, value.lower()
