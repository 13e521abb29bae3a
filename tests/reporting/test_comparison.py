"""`clpet runs --compare` on results and predictions written by hand: tables, notes, tests and refusals."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from clpet.metrics.transfer_matrix import TransferMatrix, tolist
from clpet.reporting.significance import holm, paired_bootstrap

TASKS = ["a", "b"]
COST = dict.fromkeys(
    ("seconds", "forward_examples", "backward_examples", "forward_tokens", "peak_memory_mb", "trainable_parameters",
     "stored_parameters", "replay_examples"), 1,
)  # fmt: skip
HITS = {"a": [1, 1, 0, 1], "b": [1, 0, 1, 1]}  # 75 % of either task


def write_run(
    method: str,
    seed: int = 0,
    hits: dict[str, list[int]] = HITS,
    own: dict[str, list[int]] | None = None,
    config: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """Writes a finished run whose last row and predictions are `hits` per task, and `own` in the task-incremental view."""
    own, config, tasks = own or hits, config or {}, list(hits)
    matrix, view = (TransferMatrix(tasks) for _ in range(2))
    for column, task in enumerate(tasks):
        for table, correct in ((matrix, hits), (view, own)):
            values = correct[task]
            table.record(len(tasks), column, 100 * np.mean(values), sum(values), len(values))
    signature = str(
        results.pop("signature", None) or abs(hash(json.dumps([method, config, results], sort_keys=True, default=str)))
    )
    run = {
        "method": method, "benchmark": "files", "model": "tiny", "seed": seed, "replay": "none", "peft": "lora",
        "objective": "classification", "metric": "accuracy", "signature": signature, "setting": "same",
        "overrides": [f"method={method}", f"seed={seed}"], "task_id_at_test": False, **matrix.to_json(),
        "backward": tolist(matrix.backward), "task_scores": tolist(view.scores), "task_forward": tolist(view.forward),
        "average": matrix.average(), "backward_transfer": None, "whole": 1, "forgetting": None, "learning_accuracy": None,
        "parameters": {"trainable": 1, "total": 1, "percent": 100}, "cost": [COST] * len(tasks), "diagnostics": [{"row": 2}],
        "data": {"fingerprint": "0123456789abcdef"}, **results,
    }  # fmt: skip
    folder = Path("outputs", "files", method, f"s{seed}-{signature}")
    (folder / "predictions").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(run))
    recorded = {"method": {"name": method}, "train": {"lr": 0.001, "epochs": 3, "keep": seed}, **config}
    (folder / "run.json").write_text(json.dumps({"config": recorded}))
    write_predictions(folder / "predictions" / f"after-{len(tasks):03d}.parquet", hits, own)
    return folder


def write_predictions(file: Path, hits: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    """Writes the predictions of a row of the matrix: the label is always x."""
    rows = [
        (task, "x", "x" if right else "y", float(score))
        for task in hits
        for score, right in zip(hits[task], own[task], strict=True)
    ]
    columns = dict(zip(("task", "label", "own_prediction", "score"), map(list, zip(*rows, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def lines(text: str, first: str | tuple[str, ...]) -> list[list[str]]:
    """The cells of all lines that start with one of the words `first`."""
    return [line.split() for line in text.splitlines() if line.startswith(first)]


def test_holm_by_hand() -> None:
    """Ordered p of 0.01, 0.02, 0.03 times 3, 2, 1, never below the one before."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_bootstrap_by_hand() -> None:
    """Differences 1 and 0: two draws of two are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4, so p is about 1/2."""
    a, b = ({"t": np.array(values, float)} for values in ([1, 1], [0, 1]))
    result = paired_bootstrap({0: a}, {0: b}, draws=20_000)
    assert (result.value, result.low, result.high, result.seeds) == (50, 0, 100, 1)
    assert result.p == pytest.approx(0.5, abs=0.02)
    sure = paired_bootstrap({0: a}, {0: {"t": np.zeros(2)}}, draws=100)
    assert (sure.value, sure.low, sure.high, sure.p) == (100, 100, 100, 0.01)
    equal = paired_bootstrap({0: a}, {0: a}, draws=100)
    assert (equal.value, equal.p) == (0, 1)


def test_seeds_are_resampled_from_three_on() -> None:
    """Seeds differ by 1, 1 and -1 on every example: resampling examples changes nothing, resampling seeds does."""
    one, other = {"t": np.ones(5)}, {"t": np.zeros(5)}
    two = paired_bootstrap({0: one, 1: other}, {0: other, 1: one})
    assert (two.low, two.high, two.p) == (0, 0, 1)
    three = paired_bootstrap({0: one, 1: one, 2: other}, {0: other, 1: other, 2: one})
    assert three.value == pytest.approx(100 / 3)
    assert (round(three.low), round(three.high)) == (-100, 100)
    assert three.p == pytest.approx(
        2 * (1 / 27 + 3 * 2 / 27), abs=0.05
    )  # two or three of three draws are the third seed


def test_a_table_has_sorted_rows_swept_columns_and_notes_on_other_differences(clpet) -> None:
    for lr in (0.02, 0.003, 0.1):
        write_run("replay", config={"train": {"lr": lr, "epochs": 5}}, replay="dynamic")
    for seed in (0, 1, 2):
        write_run("ewc", seed, config={"method": {"name": "ewc", "strength": 2}})
    printed = clpet("runs", "--compare", "method", "--metrics", "average").out
    assert printed.splitlines()[0] == "files: accuracy in %, mean ± standard deviation over seeds"
    assert [line.split() for line in printed.splitlines()[1:6]] == [
        ["method", "train.lr", "seeds", "average"],
        ["ewc", "0.001", "3", "75.00", "±", "0.00"],
        ["replay", "0.003", "1", "75.00"],
        ["replay", "0.02", "1", "75.00"],
        ["replay", "0.1", "1", "75.00"],
    ]
    assert "also differs: replay: none (ewc), dynamic (replay)" in printed
    assert "also differs: train.epochs: 3 (ewc), 5 (replay)" in printed
    assert "strength" not in printed  # of another method
    assert "train.keep" not in printed  # the old name of train.snapshot_every, which changes no result
    assert "snapshot_every" not in printed
    few = "fewer than 3 seeds (replay, 0.003; replay, 0.02; replay, 0.1): tests sample test examples, seeds are not sampled"
    assert few in printed
    assert [line[0] for line in lines(clpet("runs", "--compare", "train.lr").out, "0.")[:4]] == [
        "0.001",
        "0.003",
        "0.02",
        "0.1",
    ]


def test_the_resolved_softmax_is_compared(clpet) -> None:
    config = {"benchmark": {"softmax": "auto"}}
    write_run("ewc", config=config, softmax="task")
    write_run("replay", config=config, softmax="seen")
    assert "also differs: benchmark.softmax: task (ewc), seen (replay)" in clpet("runs", "--compare", "method").out


def test_only_comparable_runs_share_a_table(clpet) -> None:
    """Runs with different data, objective, metric or split go to different tables."""
    write_run("ewc")
    write_run("lwf", data={"fingerprint": "f" * 16}, config={"benchmark": {"max_train": 9}})
    write_run("kif", objective="text_to_text", metric="rouge_l")
    write_run("crl", split="validation")
    printed = clpet("runs", "--compare", "method", "--metrics", "average").out
    titles = [line for line in printed.splitlines() if line.startswith("files")]
    assert len(titles) == 4
    assert "files (data ffffffff, benchmark.max_train=9)" in printed
    assert sum("rouge_l in %" in title for title in titles) == 1
    assert sum("measured on validation" in title for title in titles) == 1
    assert "bootstrap" not in printed


def test_options_of_the_benchmark_can_be_compared(clpet) -> None:
    """Then the data may differ within a table, but a test needs equal test sets."""
    sets = {"a": "1", "b": "2"}
    for most, value in ((10, "x"), (20, "y"), (30, "z")):
        tests = {**sets, "b": "other"} if most == 30 else sets
        write_run("ewc", config={"benchmark": {"max_train": most}}, data={"fingerprint": value}, test_sets=tests)
    printed = clpet("runs", "--compare", "benchmark.max_train", "--metrics", "average").out
    assert [line[0] for line in lines(printed, ("10 ", "20 ", "30 "))[:3]] == ["10", "20", "30"]
    assert "20  " in printed.split("bootstrap")[1]
    assert "not tested: 10 against 30: their test sets differ" in printed


def test_runs_of_different_tasks_are_not_tested(clpet) -> None:
    write_run("ewc", config={"benchmark": {"tasks": "[a,b]"}})
    write_run("ewc", hits={"a": [1, 0]}, config={"benchmark": {"tasks": "[a]"}})
    printed = clpet("runs", "--compare", "benchmark.tasks").out
    assert "not tested: [a,b] against [a]: their task lists differ" in printed
    assert "the task lists differ: averages are over different tasks" in printed
    assert "95 % interval" not in printed


def test_tests_against_the_best_or_a_named_row_are_corrected(clpet) -> None:
    none = {"a": [0] * 4, "b": [0] * 4}
    some = {"a": [1, 0, 0, 1], "b": [1, 0, 1, 1]}
    for seed in (0, 1, 2):
        write_run("best", seed)
        write_run("worst", seed, none)
        write_run("middle", seed, some)
    printed = clpet("runs", "--compare", "method").out
    assert "fewer than" not in printed
    # At most 3 of 8 right is drawn with chance 0.027 where 3 of 4 are right, so 37.5 is the 2.5 % quantile.
    rows = {line[0]: line[1:] for line in lines(printed.split("bootstrap")[1], ("middle", "worst"))}
    assert rows["worst"] == ["+75.00", "[+37.50,", "+100.00]", "0.0005", "0.0010", "3"]
    assert rows["middle"][0] == "+12.50"
    assert rows["middle"][3] == rows["middle"][4]  # the larger of two p
    named = clpet("runs", "--compare", "method", "--against", "worst", "--format", "md").out
    assert "| best | -75.00 |" in named
    assert "worst minus each other row" in named
    wrong = clpet("runs", "--compare", "method", "--against", "wrost")
    assert (wrong.code, "did you mean 'worst'?" in wrong.err) == (2, True)
    assert clpet("runs", "--compare", "method", "--against", "best", "--format", "csv").code == 2
    assert "--against needs --compare" in clpet("runs", "--against", "best").err


def test_a_row_that_is_given_the_task_competes_only_in_the_task_incremental_view(clpet) -> None:
    own = {"a": [1, 1, 1, 1], "b": [1, 1, 1, 0]}
    write_run("ewc", own=own)
    write_run("lwf", hits={"a": [0] * 4, "b": [1, 0, 0, 0]})
    write_run("independent", hits=own, task_id_at_test=True)
    printed = clpet("runs", "--compare", "method", "--metrics", "average,whole").out
    assert "not tested: ewc against independent (task given): independent (task given) is given the task" in printed
    assert lines(printed, "lwf")[1][1] == "+62.50"
    printed = clpet("runs", "--compare", "method", "--metrics", "average,whole", "--view", "own").out
    assert "among each task's own labels" in printed
    assert lines(printed, "ewc")[0] == ["ewc", "1", "87.50", "87.50"]
    assert lines(printed, "independent")[-1][3] == "+0.00"
    assert lines(printed, "lwf")[-1][1] == "+75.00"


def test_csv_has_one_value_per_line(clpet) -> None:
    for seed in (0, 1):
        write_run("ewc", seed, hits={"a": [1, seed], "b": [1, 1]})
    write_run("=lwf", 0, config={"train": {"lr": 0.1, "epochs": 3}})
    rows = list(
        csv.DictReader(
            io.StringIO(clpet("runs", "--compare", "method", "--metrics", "average,bwt", "--format", "csv").out)
        )
    )
    assert [(row["method"], row["figure"], row["mean"], row["std"], row["n"]) for row in rows] == [
        ("'=lwf", "average", "75.0", "", "1"), ("'=lwf", "bwt", "", "", "0"),
        ("ewc", "average", "87.5", "17.67767", "2"), ("ewc", "bwt", "", "", "0"),
    ]  # fmt: skip
    rest = {"benchmark": "files", "objective": "classification", "metric": "accuracy", "data": "0123456789abcdef",
            "split": "test", "view": "all", "task_id_at_test": "False", "train.lr": "0.001"}  # fmt: skip
    assert {key: rows[2][key] for key in rest} == rest


def test_latex_has_rules_and_bold_best_values(clpet) -> None:
    write_run("o_lora")
    write_run("lwf", hits={"a": [1, 0, 0, 1], "b": [1, 0, 1, 1]})
    write_run("independent", hits={"a": [1], "b": [1]}, task_id_at_test=True)
    printed = clpet("runs", "--compare", "method", "--metrics", "average", "--format", "tex").out.splitlines()
    assert printed[0].startswith("% files: accuracy in")
    assert printed[1:9] == [
        r"\begin{tabular}{lrr}", r"\toprule", r"method & seeds & average \\", r"\midrule",
        r"independent (task given) & 1 & 100.00 \\", r"lwf & 1 & 62.50 \\", r"o\_lora & 1 & \textbf{75.00} \\", r"\bottomrule",
    ]  # fmt: skip
    assert printed[10].startswith("% fewer than 3 seeds")


def test_damaged_predictions_cost_one_test_and_are_named(clpet) -> None:
    for method in ("ewc", "lwf", "kif"):
        folder = write_run(method, hits=HITS if method != "kif" else {"a": [1, 0, 0, 0], "b": [1, 0, 0, 0]})
    (file,) = folder.parent.parent.glob("lwf/*/predictions/*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    printed = clpet("runs", "--compare", "method").out
    assert f"not tested: ewc against lwf: {file} cannot be read" in printed
    assert lines(printed, "kif")[1][1] == "+50.00"
    file.unlink()
    assert "no scores of test examples were saved" in clpet("runs", "--compare", "method").out


def test_an_unknown_option_is_refused(clpet) -> None:
    write_run("ewc")
    wrong = clpet("runs", "--compare", "train.lrr")
    assert (wrong.code, "no run has the option train.lrr" in wrong.err, "train.lr?" in wrong.err) == (2, True, True)


def test_settings_are_chosen_on_validation(clpet) -> None:
    """ewc: 0.1 is best on validation (50) although 0.2 is on test. Runs on validation count like recorded averages."""
    right = {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}
    for lr, validation, hits in ((0.1, 50.0, HITS), (0.2, 40.0, right)):
        for seed in (0, 1):
            averages = {"average": validation + seed, "own_average": 60.0}
            write_run("ewc", seed, hits, config={"train": {"lr": lr, "epochs": 3}}, validation=averages)
    for lr, hits in ((0.1, right), (0.2, HITS)):
        write_run("lwf", 0, hits, config={"train": {"lr": lr, "epochs": 3}}, split="validation")
    write_run("kif")
    printed = clpet("runs", "--compare", "method", "--by", "validation", "--metrics", "average").out
    assert printed.splitlines()[0].startswith("files: accuracy in %, settings chosen on validation, figures on test")
    assert lines(printed, "method")[0] == ["method", "train.lr", "settings", "validation", "seeds", "average"]
    assert lines(printed, "ewc")[0] == ["ewc", "0.1", "2", "50.50", "±", "0.71", "2", "75.00", "±", "0.00"]
    assert lines(printed, "lwf")[0] == ["lwf", "0.1", "2", "100.00", "0", "-"]
    assert "not run on test yet: lwf, 0.1: clpet train method=lwf seed=0" in printed
    assert "left out, since it has no runs on validation: kif" in printed
    assert "75.00" not in "".join(line for line in printed.splitlines() if line.startswith("lwf"))
    tidy = csv.DictReader(
        io.StringIO(
            clpet("runs", "--compare", "method", "--by", "validation", "--format", "csv", "--metrics", "average").out
        )
    )
    assert [(row["method"], row["split"], row["mean"], row["n"]) for row in tidy] == [
        ("ewc", "test", "75.0", "2"), ("ewc", "validation", "50.5", "2"), ("lwf", "test", "", "0"), ("lwf", "validation", "100.0", "1"),
    ]  # fmt: skip
    apart = clpet("runs", "--compare", "method", "--metrics", "average").out
    assert "files: accuracy in %, measured on validation" in apart  # never in one table with test


def test_choosing_on_validation_needs_validation_runs(clpet) -> None:
    write_run("ewc")
    answer = clpet("runs", "--compare", "method", "--by", "validation")
    assert (answer.code, "no run was measured on validation" in answer.err) == (2, True)


def test_costs_are_columns_and_a_budget_leaves_out_what_needs_more(clpet) -> None:
    """Per run, two tasks of 1e12, 3e12 and 2e12 operations; a run of an older version has not recorded any."""
    for method, flops, size in (("ewc", 1e12, 500), ("kif", 3e12, 2000), ("replay", 2e12, 9)):
        counters = {**COST, "forward_flops": flops / 2, "backward_flops": flops / 2, "stored_bytes": size}
        write_run(method, cost=[counters] * 2)
    write_run("lwf")
    everything = clpet("runs", "--compare", "method", "--metrics", "average", "--costs", "--sort", "flops").out
    columns = ["seeds", "average", "seconds", "flops", "stored_bytes", "replay_bytes", "peak_memory_mb"]
    assert lines(everything, "method")[0] == ["method", *columns]
    names = ("ewc", "replay", "kif", "lwf")
    cells = [[row[0], row[4], row[5]] for row in lines(everything, names) if len(row) == 8]
    assert cells == [["ewc", "2e+12", "500"], ["replay", "4e+12", "9"], ["kif", "6e+12", "2,000"], ["lwf", "-", "-"]]

    limited = clpet(
        "runs", "--compare", "method", "--metrics", "average", "--budget", "flops=4e12,stored_bytes=1000"
    ).out
    assert [row[0] for row in lines(limited, names) if len(row) == 3] == ["ewc", "replay"]
    assert "over budget: kif: above flops of 4e+12, stored_bytes of 1,000, or not recorded" in limited
    assert "over budget: lwf" in limited

    assert "no row is within the budget" in clpet("runs", "--compare", "method", "--budget", "flops=1").err
    assert "did you mean flops" in clpet("runs", "--compare", "method", "--budget", "flop=1").err
    assert "give a number, such as flops=1e12" in clpet("runs", "--compare", "method", "--budget", "flops=much").err
    assert "--costs needs --compare" in clpet("runs", "--costs").err
