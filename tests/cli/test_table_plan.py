"""`clpet reproduce --reuse`: figures in the files of a table's rows are taken over, and only what they lack is run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clpet.cli.reused_rows import reuse
from clpet.cli.table_plan import TablePlan
from clpet.config.table_spec import Row, TableSpec
from clpet.errors import ConfigError
from clpet.reporting.table_row import TableRow
from tests.conftest import domain_args, tiny_args
from tests.runs.conftest import refused

LR = ["train.lr=0.1"]


@pytest.fixture
def spec(words: Path) -> TableSpec:
    rows = {"sequential": Row(["method=sequential"]), "ncm": Row(["method=ncm"], tuned=False)}
    return TableSpec("T", tiny_args(words), rows, {"train.lr": [0.1, 0.2]}, [0, 1], ["", "benchmark.order=random"])


def file_of(plan: TablePlan, name: str, **values: object) -> TableRow:
    """A row with runs of seed 0 in the first order, as a table of this plan would have written it."""
    trials = [(trial, 1.0) for trial in plan.spec.trials(name)]
    chosen = trials[0][0] if trials else []
    signatures = {(0, 0): plan.run(name, chosen, 0).signature}
    row = TableRow(name, chosen, trials, {(0, 0): {"average": 9.0}}, signatures, num_runs=1, total_seconds=2.0)
    if trials:
        row.defaults, row.default_signatures = {(0, 0): {"average": 8.0}}, {(0, 0): plan.run(name, [], 0).signature}
    return replace(row, **values)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[TableRow], Path]:
    def write(row: TableRow) -> Path:
        (tmp_path / f"{row.name}.json").write_text(json.dumps(row.to_json()))
        return tmp_path

    return write


def planned(plan: TablePlan) -> list[tuple[str, int, int, str]]:
    tuning = [(run.row, run.order, run.seed, "validation") for run in plan.tuning()]
    final = [(run.row, run.order, run.seed, " ".join(run.trial)) for run in plan.final([])]
    return [*tuning, *final, *((run.row, run.order, run.seed, "default") for run in plan.untuned())]


def test_only_what_a_kept_row_lacks_is_planned(spec, write) -> None:
    plan = TablePlan(spec, Path("outputs"))
    write(file_of(plan, "sequential"))
    reused, lines = reuse(plan, write(file_of(plan, "ncm")))
    assert lines[0].startswith("reused: 2 runs of 2 of 2 rows in ")
    later = [(0, 1), (1, 0), (1, 1)]
    assert planned(reused) == [
        *(("sequential", order, seed, "train.lr=0.1") for order, seed in later),
        *(("ncm", order, seed, "") for order, seed in later),
        ("sequential", 0, 1, "default"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trials": [(LR, 1.0)]}, "other trials"),
        ({"signatures": {(0, 0): "0"}}, "another configuration"),
        ({"default_signatures": {(0, 0): "0"}}, "another configuration"),
        ({"values": {(0, 7): {"average": 9.0}}, "signatures": {(0, 7): "0"}}, "other seeds or orders"),
        ({"values": {(2, 0): {"average": 9.0}}, "signatures": {(2, 0): "0"}}, "other seeds or orders"),
        ({"values": {(0, 1): {"average": 9.0}}, "signatures": {(0, 1): "0"}}, "trials had another seed"),
    ],
)
def test_the_file_of_other_runs_is_not_kept(spec, write, change, reason) -> None:
    plan = TablePlan(replace(spec, rows={"sequential": spec.rows["sequential"]}), Path("outputs"))
    folder = write(file_of(plan, "sequential", **change))
    reused, lines = reuse(plan, folder)
    assert not reused.reused
    assert lines[0].startswith("reused: 0 runs of 0 of 1 rows")
    assert lines[1].startswith(f"not reused: {folder / 'sequential.json'}, ")
    assert reason in lines[1]
    assert len(reused.tuning()) == 2


def test_the_file_of_another_row_is_not_kept(spec, write) -> None:
    plan = TablePlan(spec, Path("outputs"))
    folder = write(file_of(plan, "ncm"))
    (folder / "ncm.json").rename(folder / "sequential.json")
    assert "of a row ncm" in reuse(plan, folder)[1][1]


@pytest.mark.parametrize(
    ("record", "difference"),
    [
        ({"versions": {"torch": "1.0"}}, r"torch \(1\.0, now 2"),
        ({"host": {"device": "cpu", "threads": 7}}, r"threads \(7, now 1\)"),
        ({"host": {"device": "cpu", "compiled": "true"}}, r"compiled \(true, now false\)"),
        ({"inputs": {"data": "a"}}, r"data \(a, now "),
    ],
)
def test_further_runs_are_made_as_those_of_the_file(spec, write, monkeypatch, record, difference) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = TablePlan(spec, Path("outputs"))
    with pytest.raises(ConfigError, match=rf"row ncm: .* differ in {difference}.*--only ncm, without --reuse"):
        reuse(plan, write(file_of(plan, "ncm", **record)))
    # A row that needs no further run may come from another machine, but not from other data.
    one = TablePlan(replace(spec, seeds=[0], orders=[""]), Path("outputs"))
    folder = write(file_of(one, "ncm", **record))
    if "inputs" in record:
        with pytest.raises(ConfigError, match=difference):
            reuse(one, folder)
    else:
        assert reuse(one, folder)[0].reused


def test_a_row_is_extended_by_runs_that_were_made_alike(spec) -> None:
    row = file_of(TablePlan(spec, Path("outputs")), "ncm", host={"threads": 1}, inputs={"data": "a"})
    more = TableRow("ncm", [], [], {(1, 0): {"average": 7.0}}, {(1, 0): "s"}, num_runs=1, host={"threads": 1})
    both = row.combined(more)
    assert (both.scores(), both.num_runs) == ({(0, 0): 9.0, (1, 0): 7.0}, 2)
    for other in ({"host": {"threads": 2}}, {"inputs": {"data": "b"}}):
        with pytest.raises(ConfigError, match=r"(threads \(1, now 2|data \(a, now b)\)"):
            row.combined(replace(more, **other))


def test_what_keep_does_not_go_with(words: Path, tmp_path: Path, clpet) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TABLE.format(words=json.dumps(tiny_args(words))))
    assert refused(clpet("reproduce", str(file), "--reuse", "--dry-run"))
    commands = clpet("reproduce", str(file), "--reuse", "--commands")
    assert all(line.startswith("clpet train ") for line in commands.out.splitlines())
    assert commands.err.startswith("reused: 0 runs of 0 of 2 rows")


TABLE = """title: Words
words: {words}
grid: {{train.lr: [1e-3, 1e-2]}}
seeds: [0, 1]
orders: ["", benchmark.order=random]
rows:
  sequential: {{words: [method=sequential]}}
  ncm: {{words: [method=ncm], tuned: false}}
budgets:
  cpu: {{}}
"""


@pytest.mark.slow
def test_a_table_that_was_extended_equals_one_made_at_once(words: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = TABLE.format(words=json.dumps(tiny_args(words)))

    def reproduce(*more: str) -> str:
        command = [sys.executable, "-m", "clpet", "reproduce", str(file), *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    smaller = text.replace("seeds: [0, 1]", "seeds: [0]").replace("  ncm: {", "  # ncm: {")
    file.write_text(smaller.replace(", benchmark.order=random]", "]"))
    reproduce()
    shutil.rmtree(tmp_path / "outputs")
    file.write_text(smaller)  # with a second order
    assert "reused: 4 runs of 1 of 1 rows" in reproduce("--reuse")
    assert len(list(tmp_path.glob("outputs/*/sequential/s*/results.json"))) == 1
    file.write_text(text)  # with a second seed and row
    assert "reused: 5 runs of 1 of 2 rows" in reproduce("--reuse")
    assert len(list(tmp_path.glob("outputs/*/sequential/s*/results.json"))) == 4  # two orders and the default more
    reproduce("--results", "whole")
    for name in ("sequential", "ncm"):
        rows = [
            json.loads((tmp_path / folder / f"mine/cpu/{name}.json").read_text()) for folder in ("results", "whole")
        ]
        for row in rows:
            for run in (*row["runs"], *row["default_runs"]):
                del run["seconds"], run["evaluation_seconds"]
            del row["total_seconds"]
        assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_table_of_perplexities(prose: Path, tmp_path: Path) -> None:
    """Lower is better; dapt, with a model for each domain, is measured by the mean of the diagonal, and is a bound."""
    file = tmp_path / "mine.yaml"
    words = json.dumps([word for word in domain_args(prose) if not word.startswith("train.lr")])
    text = TABLE.format(words=words).replace("[1e-3, 1e-2]", "[1e-5, 1e-2]")
    text = text.replace("seeds: [0, 1]", "seeds: [0]").replace(", benchmark.order=random]", "]")
    file.write_text(text.replace("  ncm: {words: [method=ncm], tuned: false}", "  dapt: {words: [method=dapt]}"))
    command = [sys.executable, "-m", "clpet", "reproduce", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Perplexity: lower is better." in done.stdout
    rows = {name: TableRow.read(tmp_path / f"results/mine/cpu/{name}.json") for name in ("sequential", "dapt")}
    assert [row.chosen for row in rows.values()] == [["train.lr=0.01"]] * 2
    assert [row.is_bound for row in rows.values()] == [False, True]
    means = []
    for path in tmp_path.glob("outputs/*/dapt/*/results.json"):
        run = json.loads(path.read_text())
        if run["split"] == "test":
            means.append(sum(run["scores"][index + 1][index] for index in range(3)) / 3)
    assert len(means) == 2  # with the chosen rate, and with the default
    assert rows["dapt"].scores() == {(0, 0): min(means)}
