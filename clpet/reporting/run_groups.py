"""Finished runs sorted for comparison: sections of what may be compared, and rows of runs that differ in their seed."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from clpet.config.identity import NOT_IDENTITY, digest
from clpet.errors import ConfigError, suggest
from clpet.runtime.untrusted_json import read_json, split_of

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
    chosen_by: Group = field(default_factory=list)  # of a row that was chosen on validation, by which runs
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

    @property
    def measure(self) -> tuple[str, ...]:
        """What its figures are, whichever split they are measured on."""
        return self.benchmark, self.objective, self.metric, self.direction, self.data

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
    found |= {f"inputs.{name}": value for name, value in run.get("inputs", {}).items() if name != "data"}
    found |= {key: str(value) for key, value in run.get("resolved", {}).items()}
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
        alike = _by(part, lambda one: (_made_of(one[0][1]), values_of(one[1], keys)))
        rows = [Row(group[0][1], [run for run, _ in group]) for group in alike.values()]
        benchmark, objective, metric, direction, split, data = kind
        every = [run for run, _ in part]
        found.append(Section(benchmark, objective, metric, direction, split, data, keys, arranged(rows, keys), every))
    return sorted(found, key=lambda section: (section.benchmark, section.split != "test"))


def _made_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """What a run is up to its seed: its configuration, its data, and the weights and the code that it has read."""
    return run["signature"], fingerprint(run), *sorted(run.get("inputs", {}).items())


def _kind(run: dict[str, Any], options: dict[str, str], own_data: bool) -> tuple[str, str, str, str, str, str]:
    lower = run["direction"] == "lower"
    objective = str(run.get("objective") or ("language_modeling" if lower else "classification"))
    metric = str(run.get("metric") or ("perplexity" if lower else "accuracy"))
    if objective == "text_to_text" and (
        own := value_of(options, "benchmark.metrics")
    ):  # of tasks that have another one
        metric += f" ({own})"
    return run["benchmark"], objective, metric, run["direction"], split_of(run), fingerprint(run) if own_data else ""


def _by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def on_validation(found: Sequence[Section], average: Callable[[Group], float | None]) -> list[Section]:
    """Of the settings of equal compared values the one with the best average on validation, with its test runs.

    Runs count that were measured on validation, or recorded it beside test; `average` is None where none did. A row
    whose setting was not run on test has no runs.
    """
    chosen = []
    for alike in _by(found, lambda section: section.measure).values():
        first, rows, left_out = alike[0], [], []
        settings = _by([row for section in alike for row in section.rows], recipe).values()
        candidates = arranged([candidate(own) for own in settings], first.keys)
        for part in _by(candidates, first.values).values():
            known = [(mean, row) for row in part if (mean := average(row.chosen_by)) is not None]
            if known:
                best = (min if first.lower else max)(known, key=lambda one: one[0])[1]
                rows.append(replace(best, tried=len(known)))
            else:
                left_out += [row.name for row in part]
        if rows:
            runs = [run for section in alike if section.split == "test" for run in section.runs]
            chosen.append(replace(first, split="test", rows=rows, runs=runs, left_out=left_out))
    return chosen


def candidate(rows: Sequence[Row]) -> Row:
    """One setting's runs on test, and, a run per seed, those that say how good it is on validation."""
    test = [run for row in rows for run in row.runs if split_of(run[1]) == "test"]
    other = [run for row in rows for run in row.runs if split_of(run[1]) != "test"]
    seeds = {run["seed"] for _, run in other}
    options = {**rows[0].options, SPLIT: "test"}
    return Row(options, test, chosen_by=[*other, *(one for one in test if one[1]["seed"] not in seeds)])


def recipe(row: Row) -> tuple[Any, ...]:
    """What a run learns and how, whichever split it is measured on."""
    kept = {key: value for key, value in row.options.items() if _identifies(key) and key != SPLIT}
    return tuple(sorted(kept.items())), row.options[GIVEN], fingerprint(row.runs[0][1])


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
            row.columns["run"] = digest(_made_of(run))
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
