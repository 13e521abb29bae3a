"""`clpet predict`: the answers of a run to the texts of a file or of stdin, in every format."""

import csv
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

import clpet as package
from clpet.api.run import Run
from tests.conftest import domain_args, tiny_args

PLAIN = {"tracking": "off", "hardware": "cpu", "model": "tiny", "benchmark": "files"}


@pytest.fixture(scope="module")
def run(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that routes texts to modules, with the weights after every task."""
    folder, learning = tmp_path_factory.mktemp("predict"), ("train.lr=1e-2", "train.epochs=6", "train.snapshot_every=1")
    args = (*tiny_args(words), "benchmark.max_length=12", "method=dynamic_conpet", *learning)
    return package.train(*args, output_dir=folder, quiet=True)


def stdin(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))


def one_line(result: SimpleNamespace) -> str:
    """The message of a refusal."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    return result.err


def test_the_test_file_gets_the_predictions_of_the_run_bit_for_bit(run: Run, words: Path, clpet) -> None:
    """After any task; with the column of tasks they are those among each task's own labels."""
    for after in (1, 3):
        assert clpet("predict", run.path, words / "test.jsonl", "--after", after, "-o", "a.parquet").code == 0
        table, recorded = pyarrow.parquet.read_table("a.parquet"), run.predictions(after=after)
        assert table.column_names[:3] == ["text", "label", "task"]
        assert table["prediction"].to_pylist() == recorded["prediction"].to_pylist()
        np.testing.assert_array_equal(table["probability"].to_numpy(), recorded["probability"].to_numpy())
        if after == 3:
            assert table["selected"].to_pylist() == recorded["selected"].to_pylist()
    assert clpet("predict", run.path, words / "test.jsonl", "--task-column", "task", "-o", "b.parquet").code == 0
    table = pyarrow.parquet.read_table("b.parquet")
    assert table["prediction"].to_pylist() == run.predictions(after=3)["own_prediction"].to_pylist()
    assert "selected" not in table.column_names  # no text was routed


def test_every_format_is_read_and_written(run: Run, clpet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows keep their columns, numbers can be read back to the same fp32, and stdout is escaped."""
    texts = ["apple apple n1", 'gold, "n2"', "nile\tn3"]
    rows = [{"id": number, "text": text, "more": {"a": [number, None]}} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("in.jsonl").write_text(lines)
    Path("in.txt").write_text("\n".join(texts) + "\n")
    with Path("in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    outputs = {}
    for name in ("in.jsonl", "in.txt", "in.csv"):
        assert clpet("predict", run.path, name, "-o", "out.jsonl").code == 0
        outputs[name] = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert [row["text"] for row in outputs[name]] == texts
    assert [{key: row[key] for key in ("id", "text", "more")} for row in outputs["in.jsonl"]] == rows
    answers = [(row["prediction"], row["probability"], row["selected"]) for row in outputs["in.jsonl"]]
    for output in outputs.values():
        assert [(row["prediction"], row["probability"], row["selected"]) for row in output] == answers

    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        assert clpet("predict", run.path, "in.jsonl", "-o", f"out{ending}").code == 0
        with Path(f"out{ending}").open(newline="") as file:
            table = list(csv.DictReader(file, delimiter=delimiter))
        assert [(row["prediction"], float(row["probability"]), row["selected"]) for row in table] == answers
        assert [row["text"] for row in table] == texts
        assert json.loads(table[1]["more"]) == {"a": [1, None]}
    assert clpet("predict", run.path, "in.jsonl", "-o", "out.parquet").code == 0
    table = pyarrow.parquet.read_table("out.parquet").to_pylist()
    assert [np.float32(row["probability"]) for row in table] == [np.float32(p) for _, p, _ in answers]

    stdin(monkeypatch, "\n".join(texts))
    printed = clpet("predict", run.path, "-")
    head, *body = [line.split("\t") for line in printed.out.splitlines()]
    assert head == ["text", "prediction", "probability", "selected"]
    assert [(label, float(p), task) for _, label, p, task in body] == answers
    assert body[2][0] == "nile\\tn3"
    stdin(monkeypatch, lines)
    printed = clpet("predict", run.path, "-", "--format", "jsonl")
    assert [json.loads(line) for line in printed.out.splitlines()] == outputs["in.jsonl"]


def test_bad_rows_are_listed_and_cut_texts_are_counted(run: Run, clpet, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "apple\n\n" + "gold " * 50 + "\r\n \npear")
    message = one_line(clpet("predict", run.path, "-"))
    assert "stdin: rows 2, 4 have an empty text (--skip-bad drops such rows)" in message
    stdin(monkeypatch, "apple\n\n" + "gold " * 50 + "\n \npear")
    result = clpet("predict", run.path, "-", "--skip-bad")
    assert [line.split("\t")[0].split()[0] for line in result.out.splitlines()[1:]] == ["apple", "gold", "pear"]
    assert "2 bad rows are dropped: stdin: rows 2, 4 have an empty text" in result.err
    assert "1 of 3 texts are cut to benchmark.max_length=12 tokens" in result.err
    stdin(monkeypatch, "")
    assert clpet("predict", run.path, "-").out.splitlines() == ["text\tprediction"]


REFUSED = [
    (["in.xls"], "in.xls ends in none of .parquet, .jsonl"),
    (["nowhere.csv"], "nowhere.csv is not a file; - reads texts from stdin"),
    (["body.csv"], "body.csv has no column text; available: body"),
    (["texts.csv"], "texts.csv has no column text; did you mean texts?"),
    (["taken.csv"], "already has a column prediction, which predict adds"),
    (["latin.csv"], "is not UTF-8 (byte 0xe9 in line 2)"),
    (["in.csv", "--task", "fruits"], "unknown task 'fruits'; did you mean fruit?"),
    (["in.csv", "--task-column", "topic"], "in.csv has no column topic"),
    (["in.csv", "--task-column", "text"], "unknown task 'apple'"),
    (["in.csv", "--task", "fruit", "--task-column", "text"], "give one"),
    (["in.csv", "-o", "out.xlsx"], "-o out.xlsx: the name must end in .csv, .tsv, .jsonl, .parquet"),
    (["in.csv", "-o", "nowhere/out.csv"], "there is no folder nowhere"),
    (["in.csv", "-o", "in.csv"], "would replace the input"),
    (["in.csv", "-o", "out.csv", "--format", "tsv"], "--format is for stdout"),
    (["mixed.jsonl", "-o", "out.parquet"], "column id has values of several types, which parquet cannot hold"),
    (["in.csv", "--after", "7"], "has no weights after 7 tasks"),
]


def test_what_cannot_be_answered_is_refused_in_one_line(run: Run, clpet) -> None:
    for name, content in {"in.csv": "text\napple\n", "body.csv": "body\napple\n", "texts.csv": "texts\napple\n",
                          "taken.csv": "text,prediction\napple,pear\n", "in.xls": "",
                          "mixed.jsonl": '{"text": "a", "id": 1}\n{"text": "b", "id": "x"}\n'}.items():  # fmt: skip
        Path(name).write_text(content)
    Path("latin.csv").write_bytes(b"text\ncaf\xe9\n")
    for words, message in REFUSED:
        assert message in one_line(clpet("predict", run.path, *words)), words
    assert not list(Path().glob("out*"))


def test_a_method_that_is_given_the_task_needs_its_name(words: Path, clpet) -> None:
    run = package.train("method=independent", *tiny_args(words), "tasks=[fruit,metal]", quiet=True)
    Path("in.txt").write_text("iron\n")
    message = one_line(clpet("predict", run.path, "in.txt"))
    assert (
        "method=independent needs the task of the texts: --task NAME (in Python task=NAME), one of fruit, metal"
        in message
    )
    result = clpet("predict", run.path, "in.txt", "--task", "metal")
    head, row = [line.split("\t") for line in result.out.splitlines()]
    assert head == ["text", "prediction", "probability"]
    assert row[1] in ("iron", "gold", "zinc", "tin")
    assert 0.25 < float(row[2]) <= 1  # among the four labels of the task


@pytest.mark.slow
def test_texts_of_several_columns_fill_the_prompt(clpet, tmp_path: Path) -> None:
    rows = [{"body": f"n{i}", "title": "t", "hint": f"h{i % 2}", "label": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("objective=text_to_text", "benchmark.max_target=4", "benchmark.prompt='{hint}: {text}'", "train.epochs=1")
    settings = {**PLAIN, "model": "tiny_t5", "data_dir": tmp_path}
    run = package.train("method=sequential", *words, "text='{title} {body}'", **settings, quiet=True)
    Path("in.csv").write_text("body,title,hint\nn1,t,h\nn2,t,\n")
    result = clpet("predict", run.path, "in.csv", "--format", "jsonl")
    model, filled = package.load(run), [{"text": "t n1", "hint": "h"}, {"text": "t n2", "hint": ""}]
    assert [json.loads(line)["prediction"] for line in result.out.splitlines()] == model.predict(filled)
    assert "1 empty cells are read as an empty text: column hint of in.csv (1)" in result.err
    Path("less.csv").write_text("body,title\nn1,t\n")
    assert "less.csv has no column hint" in one_line(clpet("predict", run.path, "less.csv"))


@pytest.mark.slow
def test_plain_text_gets_its_perplexity(prose: Path, clpet) -> None:
    run = package.train("method=sequential", *domain_args(prose), "train.epochs=1", quiet=True)
    Path("in.txt").write_text("the tide comes in\ngold does not rust\n")
    result = clpet("predict", run.path, "in.txt", "--format", "jsonl")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert list(rows[0]) == ["text", "perplexity"]
    perplexities = package.load(run).perplexity(["the tide comes in", "gold does not rust"])
    assert [row["perplexity"] for row in rows] == perplexities
    assert all(math.isfinite(value) for value in perplexities)


@pytest.mark.slow
def test_a_conversation_is_continued(clpet, tmp_path: Path) -> None:
    """Rows of messages, whose last answer is left out, of prompts, or lines of text: each ends with a user's turn."""
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "n1"}
    rows = [{"system": "s", "prompt": f"n{i % 4}", "answer": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("benchmark=chat", "model.chat_template=plain", "benchmark.max_target=6", "train.epochs=1")
    settings = {key: value for key, value in PLAIN.items() if key not in ("benchmark", "model")}
    run = package.train("method=sequential", "model=tiny_llama", *words, **settings, data_dir=tmp_path, quiet=True)
    talks = [[system, user, {"role": "assistant", "content": "b"}], [user]]
    Path("in.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    printed = clpet("predict", run.path, "in.jsonl", "--format", "jsonl")
    answers = [json.loads(line)["prediction"] for line in printed.out.splitlines()]
    assert answers == package.load(run).predict([[system, user], [user]])
    Path("in.csv").write_text("prompt,system\nn1,s\nn1,\n")
    printed = clpet("predict", run.path, "in.csv", "--format", "jsonl")
    assert [json.loads(line)["prediction"] for line in printed.out.splitlines()] == answers
    Path("bad.jsonl").write_text('{"messages": [{"role": "assistant", "content": "b"}]}\n')
    message = one_line(clpet("predict", run.path, "bad.jsonl"))
    assert "row 1 has a conversation without" in message
