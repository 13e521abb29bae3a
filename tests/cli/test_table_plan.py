"""`clpet reproduce --keep`: figures in the files of a table's rows are taken over, and only what they lack is run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clpet.cli.table_plan import TablePlan
from clpet.config.table_spec import Row, TableSpec
from clpet.errors import ConfigError
from clpet.reporting.table_row import TableRow
from clpet.runs.provenance import versions
from tests.conftest import domain_args, tiny_args

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


def test_only_what_a_kept_row_lacks_is_planned(spec, write, capsys) -> None:
    plan = TablePlan(spec, Path("outputs"))
    write(file_of(plan, "sequential"))
    kept = plan.keeping(write(file_of(plan, "ncm")))
    assert capsys.readouterr().out.startswith("kept: 2 runs of 2 of 2 rows in ")
    later = [(0, 1), (1, 0), (1, 1)]
    assert planned(kept) == [
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
    ],
)
def test_the_file_of_other_runs_is_not_kept(spec, write, capsys, change, reason) -> None:
    plan = TablePlan(replace(spec, rows={"sequential": spec.rows["sequential"]}), Path("outputs"))
    kept = plan.keeping(write(file_of(plan, "sequential", **change)))
    assert not kept.kept
    assert reason in capsys.readouterr().out
    assert len(kept.tuning()) == 2


def test_further_runs_of_a_kept_row_must_be_made_alike(spec, write) -> None:
    plan = TablePlan(spec, Path("outputs"))
    with pytest.raises(ConfigError, match=r"row ncm: .* torch \(1\.0, now .*without --keep all are made again"):
        plan.keeping(write(file_of(plan, "ncm", versions={**versions(), "torch": "1.0"})))
    # A row that needs no further run may have been made elsewhere.
    one = TablePlan(replace(spec, seeds=[0], orders=[""]), Path("outputs"))
    assert one.keeping(write(file_of(one, "ncm", versions={"torch": "1.0"}))).kept
    row = file_of(plan, "ncm", host={"threads": 1}, inputs={"data": "a"})
    more = TableRow("ncm", [], [], {(0, 1): {"average": 7.0}}, {(0, 1): "s"}, num_runs=1, host={"threads": 1})
    both = row.extended(more)
    assert (both.scores(), both.num_runs) == ({(0, 0): 9.0, (0, 1): 7.0}, 2)
    for other in ({"host": {"threads": 2}}, {"inputs": {"data": "b"}}):
        with pytest.raises(ConfigError, match=r"(threads \(1, now 2|data \(a, now b)\)"):
            row.extended(replace(more, **other))


TABLE = """title: Words
words: {words}
grid: {{train.lr: [1e-3, 1e-2]}}
seeds: [0, 1]
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

    file.write_text(text.replace("seeds: [0, 1]", "seeds: [0]").replace("  ncm: {", "  # ncm: {"))
    reproduce()
    shutil.rmtree(tmp_path / "outputs")
    file.write_text(text)
    assert "kept: 4 runs of 1 of 2 rows" in reproduce("--keep")
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/s*/results.json")]
    assert len([run for run in runs if run["method"] == "sequential"]) == 2  # of seed 1, chosen and default
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
    text = TABLE.format(words=words).replace("[1e-3, 1e-2]", "[1e-5, 1e-2]").replace("seeds: [0, 1]", "seeds: [0]")
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
