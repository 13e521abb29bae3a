"""Committed tables of results: every row's configuration still composes, and rows compute again what is committed."""

import json
from dataclasses import replace
from functools import cache
from importlib import metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import clpet
from clpet.cli.table_plan import TablePlan
from clpet.config.table_spec import TableSpec, read_table, table_files
from clpet.reporting.table_row import RowRecord, TableRow
from clpet.runtime.hardware import Device, Hardware

RESULTS = Path(__file__).parents[1] / "results"
SMOKE = RESULTS / "python_stdlib" / "smoke"
FILES = [file for file in sorted(RESULTS.glob("*/*/*.json")) if file.parents[1].name in table_files()]
FIGURES = ("average", "task_average", "bwt", "forgetting")  # bits count here; times and memory differ


@cache
def table(name: str) -> TableSpec:
    return read_table(name)


@cache
def committed(file: Path) -> SimpleNamespace:
    """A committed row: its table as it is now, and the record."""
    spec = table(file.parents[1].name).with_budget(file.parent.name, [file.stem])
    return SimpleNamespace(spec=spec, **json.loads(file.read_text()))


def name(file: Path) -> str:
    return str(file.relative_to(RESULTS))


def composed(file: Path) -> list[str]:
    """The signatures of a row's runs, one composition for each order: seeds are no part of them."""
    row = committed(file)
    by_order = {
        order: TablePlan(row.spec, Path()).run(row.row, row.chosen, row.spec.seeds[0], order).signature
        for order in range(len(row.spec.orders))
    }
    return [by_order[run["order"]] for run in row.runs]


def test_committed_rows_have_the_trials_and_runs_of_their_table() -> None:
    """Rows whose words have changed are composed here, and one row of every table; the others in a slow test."""
    assert FILES
    checked = set()
    for file in FILES:
        row = committed(file)
        assert [trial["words"] for trial in row.trials] == list(row.spec.trials(row.row)), name(file)
        runs = [(run["order"], run["seed"]) for run in row.runs]
        assert runs == list(product(range(len(row.spec.orders)), row.spec.seeds)), name(file)
        if row.words != [*row.spec.words, *row.spec.rows[row.row].words] or file.parent not in checked:
            checked.add(file.parent)
            assert composed(file) == row.signatures, name(file)


@pytest.mark.slow
def test_every_committed_row_composes_to_its_signature() -> None:
    changed = [name(file) for file in FILES if composed(file) != committed(file).signatures]
    assert not changed


def computed(file: Path, out: Path, *hardware: str, count: int = 1) -> RowRecord:
    """The record of the first runs of a committed row, computed here. Skips the test if the inputs differ here."""
    row = committed(file)
    spec = replace(row.spec, local=list(hardware))
    runs = [TablePlan(spec, out).run(row.row, row.chosen, run["seed"], run["order"]) for run in row.runs[:count]]
    for run in runs:
        clpet.train(*run.words, quiet=True)
    record = TableRow.of(row.row, row.spec, [], runs, []).to_json()
    if record["inputs"] != row.inputs:
        pytest.skip("this version of Python has other texts")
    return record


def other_hardware(row: SimpleNamespace) -> list[str]:
    """What differs here from the machine that computed a row, of all that can change last bits."""
    here: dict[str, object] = {**Hardware(device=Device.cpu).record(), "threads": row.host["threads"]}
    here |= {package: metadata.version(package) for package in ("torch", "transformers", "peft", "numpy")}
    there = {**row.versions, **row.host}
    return [key for key, value in here.items() if key != "name" and value != there.get(key)]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ncm", "sequential"])
def test_a_row_computes_to_the_committed_bits(row: str, tmp_path: Path) -> None:
    """On the hardware and versions of the committed run; elsewhere the tolerance holds, as below."""
    file = SMOKE / f"{row}.json"
    if other := other_hardware(committed(file)):
        pytest.skip(f"the row was computed with another {', '.join(other)}: it need not have equal bits here")
    record = computed(file, tmp_path, f"hardware.threads={committed(file).host['threads']}")
    there = committed(file)
    assert {key: record["runs"][0][key] for key in FIGURES} == {key: there.runs[0][key] for key in FIGURES}
    assert record["answers"] == there.answers[:1]


@pytest.mark.slow
def test_the_row_of_another_machine_lies_within_the_tolerance(tmp_path: Path) -> None:
    """Another precision and number of threads: the mean over the row's runs differs by less than the table states."""
    file = SMOKE / "sequential.json"
    there = committed(file)
    here = computed(file, tmp_path, "hardware.dtype=fp32", "hardware.threads=2", count=len(there.runs))
    means = [sum(run["average"] or 0 for run in runs) / len(runs) for runs in (here["runs"], there.runs)]
    assert there.spec.tolerance is not None
    assert means[0] == pytest.approx(means[1], abs=there.spec.tolerance)
