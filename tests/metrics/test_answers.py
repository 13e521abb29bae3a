"""Labels of answers: normalisation, labels that a metric or truncation makes equal, and warnings."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tokenizers import normalizers

from clpet.config.schema import EvaluationOptions
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.sources import Table
from clpet.data.splits import in_order
from clpet.data.traits import ANSWERS, LABELS, Traits
from clpet.errors import ConfigError, DataError
from clpet.evaluation.data_inspection import near_equal
from clpet.metrics import text_scores
from clpet.models.backbone import byte_tokenizer
from clpet.objectives.answer_encoding import check_cut_labels, encode_answers
from clpet.objectives.text_to_text import TextToText


def labelled(*labels: str, metric: str = "exact_match", max_target: int = 50) -> Benchmark:
    """One task with these labels, answered in words."""
    rows = [Example("x", label) for label in labels]
    return Benchmark("made_up", [Task("signs", rows, rows, rows, labels, metric)], max_target=max_target)


def table(folder: Path, rows: list[dict], traits: Traits = LABELS, **settings: object) -> Benchmark:
    """The benchmark of a jsonl file."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Table(name="made_up", **settings).reading_for("made_up", traits).load(str(folder))


@pytest.mark.parametrize(
    ("labels", "metric", "problem", "remedy"),
    [
        ((">50K", "<=50K"), "exact_match", "'>50K' and '<=50K' are equal", "benchmark.metric=accuracy or evaluation"),
        (("C", "C#", "C++"), "exact_match", "'C' and 'C#' are equal", "benchmark.metric=accuracy or evaluation"),
        (("5", "-5"), "exact_match", "'5' and '-5' are equal", "benchmark.metric=accuracy or evaluation"),
        (("!", "?"), "exact_match", "'!' and '?' are equal", "benchmark.metric=accuracy or evaluation"),
        (("a", "A"), "accuracy", "'a' and 'A' are equal", "benchmark.metric=first_word or evaluation"),
        (
            ("a b", "c"),
            "first_word",
            "'a b' can never be right",
            "benchmark.metric=exact_match or benchmark.metric=acc",
        ),
        (("a+", "A+", "A"), "exact_match", "'a+' and 'A+' are equal", ": set evaluation.decode=rank"),
    ],
)
def test_labels_that_are_equal_under_the_metric_are_rejected(
    labels: tuple[str, ...], metric: str, problem: str, remedy: str
) -> None:
    """The message names a remedy that works; decode=rank compares labels exactly, so it accepts every metric."""
    with pytest.raises(ConfigError) as error:
        TextToText().check_benchmark(labelled(*labels, metric=metric), EvaluationOptions())
    assert problem in str(error.value)
    assert remedy in str(error.value)
    TextToText().check_benchmark(labelled(*labels, metric=metric), EvaluationOptions(decode="rank"))
    for better_metric in text_scores.that_tell_apart(labels):
        TextToText().check_benchmark(labelled(*labels, metric=better_metric), EvaluationOptions())


def test_labels_that_are_equal_after_truncation_are_rejected() -> None:
    """With a byte tokenizer an answer is a space, its letters and the end token."""
    tokenizer = byte_tokenizer()
    long = labelled("question one", "question two", "short", max_target=10)
    with pytest.raises(DataError, match=r"'question one' and 'question two' .* needs benchmark.max_target=13"):
        check_cut_labels(partial(encode_answers, tokenizer), long)
    long = replace(long, max_target=13)
    check_cut_labels(partial(encode_answers, tokenizer), long)
    check_cut_labels(
        partial(encode_answers, tokenizer), labelled("question one", "answer two", max_target=4)
    )  # truncated, but still different
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="'Yes' and 'yes' are the same tokens"):
        check_cut_labels(partial(encode_answers, tokenizer), labelled("Yes", "yes", metric="first_word"))


def test_labels_are_stripped_and_composed(tmp_path: Path) -> None:
    """Spellings that are equal after normalisation are one label, and a note reports them."""
    spellings = ["café", " cafe\u0301", "café\t", "tea"]
    rows = [{"text": f"text {i}", "label": spellings[i % 4]} for i in range(24)]
    benchmark = table(tmp_path, rows)
    assert benchmark.labels == ["café", "tea"]
    (note,) = benchmark.report.notes()
    assert "2 labels" in note
    assert "in row 2" in note


def test_near_equal_labels_are_grouped() -> None:
    """Labels that differ in case, spaces or Unicode form only; any other difference counts."""
    labels = ["New York", "new york", "NewYork", "ﬁsh", "fish", "Straße", "STRASSE", "x1", "x2", "C", "C+"]
    assert near_equal(labels) == [["New York", "new york", "NewYork"], ["ﬁsh", "fish"], ["Straße", "STRASSE"]]


def test_near_equal_labels_give_a_warning(clpet, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["Yes", "yes", "no"][i % 3]} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = clpet("data", "files", f"data_dir={tmp_path}", "model=tiny")
    assert "warning: the labels 'Yes', 'yes' differ only in case" in result.out


def test_references_are_read_from_the_named_column_only(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": "ab"[i % 2], "references": ["a ", "b"], "others": "b"} for i in range(12)]
    settings = {"traits": ANSWERS}
    assert {example.references for example in table(tmp_path, rows, **settings).tasks[0].test} == {()}
    for column, expected in (("references", ("a", "b")), ("others", ("b",))):
        named = table(tmp_path, rows, references=column, **settings).tasks[0]
        assert {example.references for example in named.test} == {expected}
    with pytest.raises(DataError, match="has no column absent"):
        table(tmp_path, rows, references="absent", **settings)


def test_numeric_labels_are_sorted_by_value(tmp_path: Path) -> None:
    """Tasks of 4 labels out of 0 to 11 are 0-3, 4-7, 8-11, and not 0, 1, 10, 11."""
    rows = [{"text": f"text {i}", "label": i % 12} for i in range(120)]
    benchmark = table(tmp_path, rows, classes_per_task=4)
    assert [task.labels for task in benchmark.tasks] == [tuple(map(str, range(i, i + 4))) for i in (0, 4, 8)]
    assert in_order({"b10", "b9", "-1"}) == ["-1", "b10", "b9"]
    assert in_order({"-2", "10", "+9"}) == ["-2", "+9", "10"]
