"""Groups finished runs for comparison: sections of comparable runs, and rows of runs that differ only in their seed."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from clpet.config.identity import FILE_OPTIONS, NOT_IDENTITY, digest
from clpet.config.renamed import translate_keys
from clpet.errors import ConfigError, suggest
from clpet.records import Json, Results
from clpet.reporting.recorded_objective import has_labels, objective_name
from clpet.runtime.untrusted_json import read_json, split_of

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Runs = list[tuple[Path, Results]]  # (run directory, results.json)
# The options of the groups, and the seed.
NAME_KEYS = ("method", "model", "objective", "benchmark", "replay", "peft", "seed")
TASK_GIVEN = "task_id_at_test"  # True: the method gets the task of each test example, which is easier
SPLIT = "evaluation.split"
SAVING_KEYS = tuple(f"{group}.{key}" for group, keys in FILE_OPTIONS.items() for key in keys)  # no effect on results


@dataclass
class Row:
    """One row of a comparison: runs that differ only in their seed."""

    options: dict[str, str]  # {dotted key: value} of the configuration
    runs: Runs
    columns: dict[str, str] = field(default_factory=dict)  # the options that are shown
    chosen_by: Runs = field(default_factory=list)  # the validation runs that the row was chosen by
    num_settings: int = 0  # number of settings that it was chosen from

    @property
    def evidence(self) -> Runs:
        """Its runs; if it has not been run on test yet, the runs it was chosen by."""
        return self.runs or self.chosen_by

    @property
    def name(self) -> str:
        """Its name in tests and notes: the values of its columns."""
        return ", ".join(self.cells)

    @property
    def cells(self) -> list[str]:
        """The values of its columns; the method is marked if it is given the task."""
        marked = "method" if "method" in self.columns else next(iter(self.columns))
        note = {marked: " (task given)"} if self.task_given else {}
        return [f"{value}{note.get(key, '')}" for key, value in self.columns.items()]

    @property
    def task_given(self) -> bool:
        """Whether the task is given at test."""
        return self.options[TASK_GIVEN] == "True"


@dataclass
class Section:
    """One table: rows of the same benchmark, objective, metric, split and data.

    `keys` are the compared options; `runs` also contain the reference runs that some metrics need.
    """

    benchmark: str
    objective: str
    metric: str
    direction: str
    split: str
    data: str
    keys: list[str]
    rows: list[Row]
    runs: Runs
    left_out: list[str] = field(default_factory=list)  # names of test rows without a run on validation
    over_budget: list[str] = field(default_factory=list)  # rows that need more than a budget, with the reason

    @property
    def lower(self) -> bool:
        """Whether lower scores are better."""
        return self.direction == "lower"

    @property
    def measure(self) -> tuple[str, ...]:
        """The quantity that its scores measure, apart from the split."""
        return self.benchmark, self.objective, self.metric, self.direction, self.data

    def compared_values(self, row: Row) -> tuple[str, ...]:
        """The values of the compared options, and whether the task is given."""
        return *values_of(row.options, self.keys), row.options[TASK_GIVEN]

    @property
    def columns(self) -> list[str]:
        """The shown options: the compared ones, and those that distinguish rows with equal values."""
        return list(self.rows[0].columns)

    @property
    def other_differences(self) -> list[str]:
        """Options that differ between rows and are not shown as columns."""
        return [key for key in differing_options(self.rows) if key not in self.columns]


def options_of(path: Path, run: Results) -> dict[str, str]:
    """{dotted key: value} of a run's configuration; automatic options have the values they were resolved to."""
    record = read_json(path / "run.json")
    translate_keys(record.get("config"))
    options = flatten(record.get("config"), str)
    options |= {key: str(run.get(key)) for key in NAME_KEYS} | {"objective": objective_name(run)}
    options |= {f"inputs.{name}": value for name, value in run.get("inputs", {}).items() if name != "data"}
    options |= {key: str(value) for key, value in run.get("resolved", {}).items()}
    if run.get("softmax"):  # what benchmark.softmax=auto was resolved to
        options["benchmark.softmax"] = str(run["softmax"])
    return {**options, TASK_GIVEN: str(run["task_id_at_test"]), SPLIT: split_of(run)}


def flatten(node: Json, leaf: Callable[[Json], T], prefix: str = "") -> dict[str, T]:
    """{dotted key: `leaf` of the value} of a nested configuration."""
    if not isinstance(node, Mapping):
        return {prefix: leaf(node)}
    children = (flatten(value, leaf, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for child in children for key, value in child.items()}


def value_of(options: dict[str, str], key: str) -> str | None:
    """An option's value; for a key with sub-options all of them as key=value; None for an unknown key."""
    if key in options:
        return options[key]
    nested = {name: value for name, value in options.items() if name.startswith(f"{key}.")}
    return ", ".join(f"{name.removeprefix(f'{key}.')}={value}" for name, value in nested.items()) or None


def values_of(options: dict[str, str], keys: Sequence[str]) -> tuple[str, ...]:
    """The values of several keys; "-" for a key that the run does not have."""
    return tuple(value_of(options, key) or "-" for key in keys)


def fingerprint(run: Results) -> str:
    """Hash of the data of a run."""
    data = run.get("data")
    return str(data.get("fingerprint", "")) if data else ""


def same_tests(a: Results, b: Results) -> bool:
    """Whether two runs of one split were measured on the same examples of the same tasks, by their recorded hashes."""
    test_sets = a.get("test_sets") if "test_sets" in b else None
    return test_sets == b["test_sets"] if test_sets else bool(fingerprint(a)) and fingerprint(a) == fingerprint(b)


def make_sections(runs: Runs, keys: list[str]) -> list[Section]:
    """The tables of a comparison by `keys`, their rows sorted. Raises ConfigError for a key that no run has.

    Runs on different data go to different sections, unless `keys` contain options of the benchmark.
    """
    split_by_data = not any(key.startswith("benchmark.") or key == "data_dir" for key in keys)
    pairs = [((path, run), options_of(path, run)) for path, run in runs]
    for key in keys:
        if all(value_of(options, key) is None for _, options in pairs):
            names = {name for _, options in pairs for name in options}
            raise ConfigError(f"no run has the option {key} in its configuration{suggest(key, names)}")
    result = []
    for kind, members in _group_by(pairs, lambda pair: _kind(pair[0][1], pair[1], split_by_data)).items():
        by_seed = _group_by(members, lambda pair: (_without_seed(pair[0][1]), values_of(pair[1], keys)))
        rows = [Row(seeds[0][1], [run for run, _ in seeds]) for seeds in by_seed.values()]
        benchmark, objective, metric, direction, split, data = kind
        every = [run for run, _ in members]
        result.append(Section(benchmark, objective, metric, direction, split, data, keys, sort_rows(rows, keys), every))
    return sorted(result, key=lambda section: (section.benchmark, section.split != "test"))


def _without_seed(run: Results) -> tuple[Hashable, ...]:
    """Identifies a run apart from its seed: configuration, data, weights and code."""
    return run["signature"], fingerprint(run), *sorted(run.get("inputs", {}).items())


def _kind(run: Results, options: dict[str, str], split_by_data: bool) -> tuple[str, str, str, str, str, str]:
    """(benchmark, objective, metric, direction, split, data) of the section a run belongs to."""
    lower = run["direction"] == "lower"
    metric = str(run.get("metric") or ("perplexity" if lower else "accuracy"))
    if not has_labels(run) and (exceptions := value_of(options, "benchmark.metrics")):
        metric += f" ({exceptions})"  # tasks with a metric of their own
    data = fingerprint(run) if split_by_data else ""
    return run["benchmark"], objective_name(run), metric, run["direction"], split_of(run), data


def _group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def choose_on_validation(sections: Sequence[Section], average: Callable[[Runs], float | None]) -> list[Section]:
    """Keeps, of all settings with equal compared values, the one with the best average on validation.

    The rows of the result have the test runs of that setting, or no runs if it was not run on test. `average` gives
    the validation average of a setting's runs: of runs measured on validation, or of test runs that recorded it too.
    """
    result = []
    for alike in _group_by(sections, lambda section: section.measure).values():
        first, rows, left_out = alike[0], [], []
        settings = _group_by([row for section in alike for row in section.rows], _setting_key).values()
        candidates = sort_rows([_merge_splits(setting_rows) for setting_rows in settings], first.keys)
        for competitors in _group_by(candidates, first.compared_values).values():
            measured = [(mean, row) for row in competitors if (mean := average(row.chosen_by)) is not None]
            if measured:
                best = (min if first.lower else max)(measured, key=lambda pair: pair[0])[1]
                rows.append(replace(best, num_settings=len(measured)))
            else:
                left_out += [row.name for row in competitors]
        if rows:
            runs = [run for section in alike if section.split == "test" for run in section.runs]
            result.append(replace(first, split="test", rows=rows, runs=runs, left_out=left_out))
    return result


def _merge_splits(rows: Sequence[Row]) -> Row:
    """One setting's test runs, and in `chosen_by` one run per seed that has its validation average."""
    test = [run for row in rows for run in row.runs if split_of(run[1]) == "test"]
    validation = [run for row in rows for run in row.runs if split_of(run[1]) != "test"]
    seeds = {run["seed"] for _, run in validation}
    options = {**rows[0].options, SPLIT: "test"}
    return Row(options, test, chosen_by=[*validation, *(run for run in test if run[1]["seed"] not in seeds)])


def _setting_key(row: Row) -> tuple[Hashable, ...]:
    """Identifies a setting, whichever split it was measured on."""
    options = {key: value for key, value in row.options.items() if _identifies(key) and key != SPLIT}
    return tuple(sorted(options.items())), row.options[TASK_GIVEN], fingerprint(row.runs[0][1])


def sort_rows(rows: list[Row], keys: Sequence[str]) -> list[Row]:
    """Sets the columns of the rows and sorts by them: `keys`, then options until rows with equal values differ."""
    columns = list(keys)
    while equal := _indistinguishable(rows, columns):
        new = [key for group in equal for key in differing_options(group) if key not in columns]
        if not new:
            break
        columns.append(new[0])
    for row in rows:
        row.columns = dict(zip(columns, values_of(row.options, columns), strict=True))
        if equal:  # no option distinguishes them (the data or weights differ): show a hash
            _, run = row.evidence[0]
            row.columns["run"] = digest(_without_seed(run))
    return sorted(rows, key=lambda row: [natural_key(value) for value in row.columns.values()])


def _indistinguishable(rows: list[Row], columns: Sequence[str]) -> list[list[Row]]:
    """Groups of rows with equal values in all columns."""
    groups = _group_by(rows, lambda row: values_of(row.options, columns)).values()
    return [group for group in groups if len(group) > 1]


def differing_options(rows: Sequence[Row]) -> list[str]:
    """Options that differ between rows, in the order of the configuration.

    If rows differ in the option of a group, such as method, the options inside that group are left out.
    """
    keys = dict.fromkeys(key for row in rows for key in row.options)
    differ = [key for key in keys if len({row.options.get(key) for row in rows}) > 1]
    groups = [key for key in NAME_KEYS if key in differ and key != "seed"]
    return [*groups, *(key for key in differ if _identifies(key) and key.partition(".")[0] not in groups)]


def values_by_row(rows: Sequence[Row], key: str) -> str:
    """Each value of an option with the rows that have it, named by their first column if that is unambiguous."""
    values = [value_of(row.options, key) or "-" for row in rows]
    by_first_column = {row.cells[0]: value for row, value in zip(rows, values, strict=True)}
    unambiguous = all(by_first_column[row.cells[0]] == value for row, value in zip(rows, values, strict=True))
    names: dict[str, dict[str, None]] = {}
    for row, value in zip(rows, values, strict=True):
        names.setdefault(value, {})[row.cells[0] if unambiguous else row.name] = None
    return ", ".join(f"{value} ({'; '.join(row_names)})" for value, row_names in names.items())


def _identifies(key: str) -> bool:
    """Whether an option can change a run's results, and is not the name of a group's option."""
    return key.partition(".")[0] not in NOT_IDENTITY and key not in (*SAVING_KEYS, *NAME_KEYS, TASK_GIVEN)


def natural_key(value: str) -> tuple[int, float, str]:
    """Sorting key: numbers by value, then words alphabetically, then missing values."""
    try:
        return 0, float(value), ""
    except ValueError:
        return (2 if value in ("-", "None") else 1), 0.0, value.lower()
