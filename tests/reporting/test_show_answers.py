"""`clpet show RUN --confusion` and `--mistakes N`, and what a run records of its answers."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from clpet.evaluation.evaluator import Evaluator
from clpet.metrics.label_scores import label_counts, macro_f1
from tests.conftest import domain_args, tiny_args
from tests.runs.conftest import only


@pytest.fixture
def trained(clpet, words: Path) -> Path:
    """A run that records texts and macro-F1."""
    args = tiny_args(words, "method=replay", "evaluation.keep_text=true", "evaluation.metrics=[accuracy,macro_f1]")
    answer = clpet("train", *args)
    assert answer.code == 0, answer.err
    assert "macro f1" in answer.out
    return only()


def test_a_run_records_probabilities_texts_and_macro_f1(trained: Path, words: Path) -> None:
    rows = pq.read_table(trained / "predictions" / "after-003.parquet").to_pylist()
    texts = {json.loads(line)["text"] for line in (words / "test.jsonl").read_text().splitlines()}
    assert {row["text"] for row in rows} == texts
    assert all(1 / 12 <= row["probability"] <= 1 for row in rows)
    results = json.loads((trained / "results.json").read_text())
    last, by_task = results["diagnostics"][-1], {}
    for task in results["tasks"]:
        members = [row for row in rows if row["task"] == task]
        by_task[task] = macro_f1(label_counts([r["label"] for r in members], [r["prediction"] for r in members]))
        assert last[f"macro_f1/{task}"] == pytest.approx(by_task[task])
    assert last["macro_f1"] == pytest.approx(np.mean(list(by_task.values())))
    first = pq.read_table(trained / "predictions" / "after-000.parquet").to_pylist()
    assert {row["probability"] for row in first} == {None}  # no label has been seen


def test_the_probability_is_the_softmax_over_the_labels_seen(make) -> None:
    run = make("method=sequential")
    run.learn(0)
    evaluation = Evaluator(run.benchmark, run.data)(run.method, 1, [0])
    objective = run.method.objective
    with torch.inference_mode():
        logits = objective.logits(run.data.test.batch(evaluation.rows["row"]))  # four rows of the head
    expected = logits.softmax(1).max(1).values
    assert evaluation.rows["probability"] == pytest.approx(expected.numpy(), rel=1e-5)


def test_show_prints_confusions_and_mistakes(trained: Path, clpet) -> None:
    rows = pq.read_table(trained / "predictions" / "after-003.parquet").to_pylist()
    wrong = sorted(
        (row for row in rows if row["task"] == "fruit" and row["score"] < 1), key=lambda r: -r["probability"]
    )
    answer = clpet("show", str(trained), "--confusion", "--mistakes", "2")
    assert answer.code == 0, answer.err
    right = 8 - len(wrong)
    assert f"fruit: {right} of 8 right ({100 * right / 8:.2f} %), macro-F1 " in answer.out
    assert "label \\ predicted" in answer.out
    if wrong:
        block = answer.out.split(f"fruit: the most confident of {len(wrong)} mistakes")[1].splitlines()[2:4]
        for line, row in zip(block, wrong, strict=False):
            assert line.split()[:4] == [
                str(row["example"]),
                row["label"],
                row["prediction"],
                f"{row['probability']:.3f}",
            ]
            assert row["text"] in line
    assert clpet("show", str(trained), "--mistakes", "-1").code == 2
    assert clpet("show", str(trained), "--confusion", "--html").code == 2


def test_options_of_answers_are_refused_where_they_mean_nothing(clpet, words: Path, prose: Path) -> None:
    for args, reason in (
        (tiny_args(words, "evaluation.metrics=[macro_f1]"), "a list with accuracy"),
        (tiny_args(words, "evaluation.keep_text=true", "evaluation.predictions=false"), "evaluation.keep_text"),
        (domain_args(prose, "evaluation.keep_text=true"), "evaluation.keep_text is for"),
        (domain_args(prose, "evaluation.metrics=[accuracy,macro_f1]"), "evaluation.metrics is for classification"),
    ):
        answer = clpet("train", "method=sequential", *args)
        assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
        assert reason in answer.err


def test_new_options_keep_the_names_of_run_directories(words: Path) -> None:
    from clpet.config.compose import compose_config
    from clpet.config.identity import signature

    plain = signature(compose_config(tiny_args(words, "method=sequential")))
    assert signature(compose_config(tiny_args(words, "method=sequential", "evaluation.keep_text=true"))) == plain
    with_f1 = tiny_args(words, "method=sequential", "evaluation.metrics=[accuracy,macro_f1]")
    assert signature(compose_config(with_f1)) != plain
