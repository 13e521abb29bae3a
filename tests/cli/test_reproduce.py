"""`clpet reproduce`: equal tuning, all seeds and orders, and the same table after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from clpet.cli.reproduce import check_inputs, check_local
from clpet.cli.table_plan import best_trial, compose
from clpet.config.build import parse_config
from clpet.config.table_spec import Published, Row, TableSpec, read_table, table_files
from clpet.errors import ConfigError
from clpet.reporting.planned_run import PlannedRun
from clpet.reporting.result_table import ResultTable
from clpet.reporting.run_metrics import t_probability
from clpet.reporting.table_row import TableRow
from clpet.reporting.table_statistics import (
    Paired,
    Variances,
    over_examples,
    paired_difference,
    rank_correlation,
    variances,
)
from clpet.wiring import Components
from tests.conftest import shared, tiny_args
from tests.runs.conftest import refused

TABLE = """title: Words
words: {words}
grid: {{train.lr: [1e-3, 1e-2]}}
seeds: [0, 1]
rows:
  sequential: {{words: [method=sequential], published: {{average: 12.5, source: "Someone, table 3"}}}}
  ncm: {{words: [method=ncm], tuned: false}}
budgets:
  smoke: {{seeds: [0]}}
"""


def table_file(words: Path, folder: Path) -> Path:
    file = folder / "mine.yaml"
    file.write_text(TABLE.format(words=json.dumps(tiny_args(words))))
    return file


def test_probabilities_of_student_s_t() -> None:
    assert t_probability(2.228139, 10) == pytest.approx(0.05, abs=1e-6)
    assert t_probability(0, 3) == 1
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, p = 0.0742.
    pairs = {(0, 0): (1.0, 0.0), (0, 1): (3.0, 1.0), (0, 2): (4.0, 1.0)}
    a, b = ({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    # Interval: 2 ± t(2) / sqrt(3) with t(2) = 4.302653.
    assert paired_difference(a, b) == pytest.approx((2, -0.484138, 4.484138, 0.074180, 3), abs=1e-6)
    assert paired_difference(a, {(0, 0): 0.5}) == Paired(0.5, None, None, None, 1)
    assert paired_difference(a, {(1, 0): 0.0}) is None
    assert paired_difference(a, a) == Paired(0, 0, 0, 1, 3)


def test_the_error_over_examples_and_runs_by_hand() -> None:
    # Two runs, tasks of 3 and 2 examples. Averages of the runs: (2/3 + 1/2) / 2 and (1 + 0) / 2: 58.3333 and 50.
    a = {(0, 0): {"x": np.array([1.0, 1, 0]), "y": np.array([1.0, 0])}, (0, 1): {"x": np.ones(3), "y": np.zeros(2)}}
    # Means over runs 100, 100, 50: variance 833.3333 / 3; 50, 0: variance 1250 / 2; over T² = 4: 225.6944 with 3 degrees.
    # Of the runs: variance 34.7222 / 2 = 17.3611 with 1. Freedom: 243.0556² / (225.6944² / 3 + 17.3611²) = 3.417.
    value = over_examples(a)
    assert value == pytest.approx((54.166667, 54.166667 - 3.182446 * 15.590239, 103.781, 0.0402, 2), abs=1e-3)
    # With one run the examples alone: variances 3333.333 / 3 and 5000 / 2, over 4: 902.7778.
    assert over_examples(a, {(0, 0): {"x": np.zeros(3), "y": np.zeros(2)}}) == pytest.approx(
        (58.333333, 58.333333 - 3.182446 * 30.046261, 153.954, 0.1476, 1), abs=1e-3
    )
    assert over_examples(a, a) == Paired(0, 0, 0, 1, 2)
    assert over_examples(a, {(1, 0): a[0, 0]}) is None
    assert over_examples(a, {(0, 0): {"x": np.ones(3)}}) is None


def test_what_orders_and_seeds_contribute() -> None:
    # Variances within the orders 2 and 8, mean 5; means of the orders 2 and 7, variance 12.5; 12.5 - 5 / 2 = 10.
    scores = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0, (1, 1): 9.0}
    assert variances(scores) == Variances(10, 5)
    assert variances({key: value for key, value in scores.items() if key[0] == 0}) is None
    assert variances({**scores, (2, 0): 1.0}) is None
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 5, 5, 9], [0, 1, 2, 3]) == pytest.approx(0.948683, abs=1e-6)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1], [1, 2]) is None


def row(name: str, averages: dict[tuple[int, int], float], **more: object) -> TableRow:
    values, signatures = {key: {"average": value} for key, value in averages.items()}, dict.fromkeys(averages, "s")
    return TableRow(name, ["train.lr=0.1"], [], values, signatures, **more)


@pytest.mark.usefixtures("rendered")
def test_the_table_by_hand(tmp_path: Path) -> None:
    rows = [
        row("b", {(0, seed): 2.0 for seed in range(3)}),
        row(
            "a",
            {(0, seed): 3.0 + seed for seed in range(3)},
            defaults={(0, seed): {"average": 2.0} for seed in range(3)},
            default_signatures={(0, seed): "d" for seed in range(3)},
        ),
    ]
    answers = {(0, 0): {"x": np.array([1.0, 0, 1, 0, 0, 0, 1, 0, 1])}}
    table = ResultTable("T", "cpu", {}, [*rows, row("c", {(0, 0): 1.0}, answers=answers)])
    lines = table.text("text").splitlines()
    assert lines[0] == "T (budget cpu)"
    # a: mean 4, deviation 1, half width 4.302653 / sqrt(3) = 2.484138; the differences are 1, 2, 3 as above.
    assert lines[3].split()[:8] == ["a", "train.lr=0.1", "4.00", "±", "1.00", "1.52", "to", "6.48"]
    assert lines[3].split()[12:16] == ["2.00", "+2.00", "[-0.48,", "+4.48]"]
    assert "0.074" in lines[4].split()
    assert table.order_lines() == []
    table.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"a.json", "table.md", "tuning.svg", "tuning.png"}
    spec = TableSpec("T", [], {"a": Row(), "b": Row()}, {}, [0, 1, 2], [""])
    again = ResultTable.read(spec, "cpu", tmp_path)
    assert again.rows[:2] == table.rows[:2]
    assert again.rows[2].answers[0, 0]["x"].tolist() == answers[0, 0]["x"].tolist()
    assert '"x": "9:a280"' in (tmp_path / "c.json").read_text()  # 1010 0010 1
    assert again.text("md") == table.text("md")


def test_the_order_s_lines_of_a_table() -> None:
    rows = [
        row("a", {(0, 0): 1, (0, 1): 3, (1, 0): 5, (1, 1): 9}),  # variances 10 and 5, as above
        row("b", {(0, 0): 4, (0, 1): 6, (1, 0): 1, (1, 1): 3}),  # (5 - 2)² / 2 - 2 / 2 = 3.5 and 2
    ]
    (line,) = ResultTable("T", "cpu", {}, rows).order_lines()
    assert "between orders 2.60, between seeds 1.87" in line  # sqrt(13.5 / 2), sqrt(7 / 2)
    assert line.endswith("rank correlation of the rows between orders -1.00.")  # a is behind in one, ahead in the other


def test_a_row_may_replace_values_of_the_grid_by_equally_many() -> None:
    rows = {"plain": Row(["method=a"]), "prompts": Row(["method=b"], grid={"train.lr": [0.1, 0.3]})}
    spec = TableSpec("T", [], {**rows, "fixed": Row(["method=c", "train.lr=1"])}, {"train.lr": [1, 2]})
    assert list(spec.trials("plain")) == [["train.lr=1"], ["train.lr=2"]]
    assert list(spec.trials("prompts")) == [["train.lr=0.1"], ["train.lr=0.3"]]
    assert list(spec.trials("fixed")) == []
    rows["prompts"].grid["train.lr"] = [0.1]
    with pytest.raises(
        ConfigError, match=r"mine: rows\.prompts\.grid\.train\.lr needs as many values as grid\.train\.lr"
    ):
        spec.check("mine")


def test_where_lower_is_better_the_lowest_row_comes_first() -> None:
    """Perplexities: the gain of tuning is what it lowers the average by, the gap ours minus the published one."""
    defaults = {(0, seed): {"average": 25.0 + seed} for seed in range(2)}
    rows = [
        row("a", {(0, 0): 30, (0, 1): 32}, lower=True),
        row("b", {(0, 0): 20, (0, 1): 21}, lower=True, defaults=defaults),
    ]
    table = ResultTable("T", "cpu", {"b": Published(18, "Someone")}, rows)
    assert [each.name for each in table.rows] == ["b", "a"]
    gain = table.rows[0].gain()
    assert gain is not None
    assert gain.mean == 5
    assert "+2.50" in table.text("text").splitlines()[3]
    assert "lower is better" in table.legend()


def test_the_best_trial_is_chosen_on_validation(tmp_path: Path) -> None:
    def trials(tasks: list[str], direction: str, *scores: list[list[float | None]]) -> list[PlannedRun]:
        return [
            Finished("a", [], tmp_path, 0, 0, [f"train.lr={lr}"], record={"tasks": tasks, "direction": direction}
                     | dict.fromkeys(("scores", "correct", "total"), rows))
            for lr, rows in enumerate(scores, 1)
        ]  # fmt: skip

    assert best_trial([]) == []
    for direction, chosen in (("higher", 2), ("lower", 1)):
        assert best_trial(trials(["x"], direction, *([[0.0], [score]] for score in (5.0, 7.0, 7.0)))) == [
            f"train.lr={chosen}"
        ]
    # A model for each task (dapt): means of the diagonals 5, 4 and 6.
    diagonals = [[[9.0, 9.0], [score, None], [None, 4.0]] for score in (6.0, 4.0, 8.0)]
    assert best_trial(trials(["x", "y"], "lower", *diagonals)) == ["train.lr=2"]


@dataclass(frozen=True)
class Finished(PlannedRun):
    record: dict[str, object] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, object]:  # type: ignore[override]
        return self.record


@pytest.mark.slow
@pytest.mark.parametrize("name", table_files())
def test_shipped_tables_compose(name: str) -> None:
    """Every row in the largest budget that has it, with its parts checked against each other, without data and weights.

    A budget may choose the model.
    """
    table = read_table(name)
    data_dir = shared("weights") if "model=local" in table.words else Path("x")  # local models are looked into
    budgets = sorted((table.with_budget(budget, []) for budget in table.budgets), key=lambda spec: -len(spec.rows))
    composed = set[str]()
    for spec in budgets:
        for row in spec.rows.keys() - composed or list(spec.rows)[:1]:
            trial, order = next(iter(spec.trials(row)), []), spec.orders[-1]
            words = [*spec.run_words(row, trial, spec.seeds[-1], order), f"data_dir={data_dir}"]
            Components.build(parse_config(compose(row, words)))
            composed.add(row)
    assert composed == set(table.rows)


def test_a_dry_run_checks_every_row(words: Path, tmp_path: Path, clpet) -> None:
    file = table_file(words, tmp_path)
    done = clpet("reproduce", str(file), "--budget", "smoke", "--dry-run")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[:4] for row in rows[:2]] == [
        ["sequential", "4", "runs", "composes,"],
        ["ncm", "1", "runs", "composes,"],
    ]
    assert "2,444 trained parameters" in done.out
    assert done.out.splitlines()[2].startswith("2 rows, 0:00:")
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("*/*/s*"))
    file.write_text(file.read_text().replace("method=ncm", "method=ewc, objective=language_modeling"))
    wrong = clpet("reproduce", str(file), "--budget", "smoke", "--dry-run", "--only", "ncm")
    assert refused(wrong)
    assert "row ncm: " in wrong.err
    file.write_text(file.read_text().replace("method=ewc, objective=language_modeling", "method=nothing"))
    wrong = clpet("reproduce", str(file), "--budget", "smoke", "--dry-run", "--only", "ncm")
    assert refused(wrong)
    assert "row ncm: " in wrong.err


def test_a_table_is_listed_and_printed_as_commands(words: Path, tmp_path: Path, clpet) -> None:
    file = table_file(words, tmp_path)
    text = clpet("reproduce", str(file), "--budget", "smoke", "--list").out
    assert "missing 2 of 2 trials" in text
    assert "runs    2 rows x 1 orders x 1 seeds" in text
    commands = clpet("reproduce", str(file), "--budget", "smoke", "--commands").out.splitlines()
    assert len(commands) == 2
    assert all(line.startswith("clpet train ") and "evaluation.split=validation" in line for line in commands)
    elsewhere = clpet(
        "reproduce", str(file), "--budget", "smoke", f"data_dir={tmp_path}", "--commands"
    ).out.splitlines()
    assert all(f" data_dir={tmp_path} " in line for line in elsewhere)
    for wrong in (("nowhere",), (str(file), "--budget", "cpu"), (str(file), "--budget", "smoke", "--only", "kif"),
                  (str(file), "--budget", "smoke", "--parallel", "0"), (str(file), "--budget", "smoke", "seed=1"),
                  (str(file), "--budget", "smoke", "train.epochs=1")):  # fmt: skip
        assert refused(clpet("reproduce", *wrong)), wrong
    file.write_text(file.read_text() + "colour: red\n")
    assert refused(clpet("reproduce", str(file), "--budget", "smoke"))


def test_runs_on_different_data_make_no_table(tmp_path: Path) -> None:
    class Finished:
        row, words, order = "a", [], 0

        def __init__(self, name: str, fingerprint: str) -> None:
            self.out = tmp_path / name
            self.results = {"split": "test", "test_sets": {"x": fingerprint}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clpet.runs.provenance.check_finished", lambda *_: None)
        check_inputs([Finished("1", "f"), Finished("2", "f")])  # type: ignore[list-item]
        with pytest.raises(ConfigError, match="different examples of task x"):
            check_inputs([Finished("1", "f"), Finished("2", "g")])  # type: ignore[list-item]


def test_options_that_a_row_fixes_are_not_tuned() -> None:
    rows = {"a": Row(["method=ewc", "train.lr=1"]), "b": Row(["method=ewc"]), "c": Row(tuned=False)}
    spec = TableSpec("T", [], rows, {"train.lr": [1, 2], "peft.r": [4]})
    trials = {name: list(spec.trials(name)) for name in rows}
    assert trials == {"a": [["peft.r=4"]], "b": [["train.lr=1", "peft.r=4"], ["train.lr=2", "peft.r=4"]], "c": []}


@pytest.mark.slow
def test_kill_9_and_a_second_start_end_with_the_same_table(words: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clpet", "reproduce", str(table_file(words, tmp_path)), "--budget", "smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "whole").mkdir()
    whole = subprocess.run(command, cwd=tmp_path / "whole", env=environment, capture_output=True, text=True, check=True)
    assert "12.5 (Someone, table 3)" in whole.stdout
    (tmp_path / "cut").mkdir()
    process = subprocess.Popen(command, cwd=tmp_path / "cut", env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("outputs/*/*/s*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)  # into the next run, which notices nothing of the kill
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "results").exists()
    again = subprocess.run(command, cwd=tmp_path / "cut", env=environment, capture_output=True, text=True, check=True)
    assert "trials on validation data: 0 of 2 finished" not in again.stdout
    rows = [
        json.loads((tmp_path / name / "results/mine/smoke/sequential.json").read_text()) for name in ("whole", "cut")
    ]
    for row in rows:
        for run in (*row["runs"], *row["default_runs"]):
            del run["seconds"], run["evaluation_seconds"]
        del row["total_seconds"]
    assert rows[0] == rows[1]
    assert len(rows[0]["trials"]) == 2
    assert len(rows[0]["default_runs"]) == 1
    tables = [(tmp_path / name / "results/mine/smoke/table.md").read_text().splitlines() for name in ("whole", "cut")]
    assert [line.split(" | ")[:8] for line in tables[0]] == [line.split(" | ")[:8] for line in tables[1]]


def test_rows_are_tested_against_the_best_one_under_their_own_conditions() -> None:
    rows = [
        row("joint", {(0, seed): 9.0 + seed for seed in range(3)}, all_at_once=True),
        row("a", {(0, seed): 3.0 + seed for seed in range(3)}),
        row("b", {(0, seed): 2.0 for seed in range(3)}),
    ]
    table = ResultTable("T", "cpu", {}, rows)
    assert table.reference.name == "a"
    # a - b is 1, 2, 3, as above: p 0.074. joint - a is 6 three times: p 0.
    assert table.tests() == pytest.approx({"joint": 0, "b": 0.074}, abs=1e-3)
    assert ResultTable("T", "cpu", {}, rows[:1]).reference.name == "joint"


def test_places_may_be_given_after_the_name_of_a_table() -> None:
    spec = read_table("domains").with_budget("smoke", [])
    check_local(replace(spec, local=["data_dir=DIR", "hardware.threads=1"]))
    with pytest.raises(ConfigError, match=r"would change the runs"):
        check_local(replace(spec, local=["data_dir=DIR", "train.epochs=2"]))
