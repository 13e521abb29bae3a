"""From a messy file to a trained run in two commands: `clpet data PATH`, and the command that it prints."""

import gzip
import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clpet.evaluation.data_survey import survey_report
from tests.data.test_tabular_files import put

TOPICS = {"sport": "ball goal team race", "food": "soup bread salt cake", "money": "bank loan coin cash",
          "law": "court judge trial jury"}  # fmt: skip
LIMITS = ["benchmark.max_train=16", "benchmark.max_test=8", "train.epochs=1", "tracking=off", "hardware=cpu",
          "hardware.threads=1"]  # fmt: skip


def topic_rows(count: int = 96, **more: str) -> list[dict]:
    """Rows of four topics with columns text and label; `more` renames columns."""
    random.seed(0)
    names = {"text": "text", "label": "label", **more}
    return [
        {names["text"]: f"{' '.join(random.choices(words.split(), k=8))} n{i}", names["label"]: label}
        for i, (label, words) in enumerate(list(TOPICS.items()) * (count // 4))
    ]


def cells(rows: list[dict], separator: str, end: str = "\n", header: bool = True) -> str:
    lines = [list(rows[0])] * header + [list(row.values()) for row in rows]
    return "".join(separator.join(map(str, line)) + end for line in lines)


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# The makers return the path, the words for `clpet data` and for the run, and texts that the report must contain.
Case = tuple[Path, list[str], list[str]]
SEQUENTIAL = ["model=tiny", "method=sequential"]


def semicolons_with_a_mark(folder: Path) -> Case:
    text = cells(topic_rows(text="utterance", label="intent"), ";", "\r\n")
    return put(folder / "export 1.csv", text, "utf-8-sig"), SEQUENTIAL, [
        "separated by semicolons", "text=utterance label=intent benchmark.classes_per_task=2", "'data_dir="
    ]  # fmt: skip


def latin_1(folder: Path) -> Case:
    rows = [{"text": f"{row['text']} café", "category": row["label"]} for row in topic_rows()]
    return put(folder / "data.csv", cells(rows, ","), "latin-1"), SEQUENTIAL, [
        "invalid bytes in 96 lines, 2, 3, 4, 5, 6 and 91 more", "benchmark.encoding=cp1252", "label=category"
    ]  # fmt: skip


def tsv_without_header(folder: Path) -> Case:
    text = cells(topic_rows(), "\t", header=False)
    return put(folder / "data.tsv.gz", gzip.compress(text.encode())), SEQUENTIAL, [
        "no header row: its columns are called text, label", "'benchmark.header=[text,label]'"
    ]  # fmt: skip


def nested_and_mixed(folder: Path) -> Case:
    numbers = {label: i if i % 2 else str(i) for i, label in enumerate(TOPICS)}
    rows = [
        {"id": i, "data": {"body": row["text"], "meta": {"class": numbers[row["label"]]}}}
        for i, row in enumerate(topic_rows())
    ]
    rows += [{"id": 97, "data": {"body": 5, "meta": {"class": 1}}}, {"id": 98, "data": None}]
    return put(folder / "data.jsonl", json_lines(rows) + "{broken\n"), SEQUENTIAL, [
        "mixes types: text (48), integer (48)", "text=data.body label=data.meta.class", "row 97 has a int in column data.body",
        "row 98 has no label", "row 99 has invalid JSON", "benchmark.skip_bad=true",
    ]  # fmt: skip


def integers_in_parquet(folder: Path) -> Case:
    rows = [
        {"y": list(TOPICS).index(row["label"]), "sentence": row["text"], "idx": i} for i, row in enumerate(topic_rows())
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "all.parquet")
    return folder, SEQUENTIAL, ["text=sentence label=y", "no problems"]


def json_array(folder: Path) -> Case:
    rows = [{**row, "language": ["en", "fr"][i // 4 % 2]} for i, row in enumerate(topic_rows())]
    return (
        put(folder / "rows.json", json.dumps(rows)),
        SEQUENTIAL,
        ["the tasks are the values of language", "task=language"],
    )


def task_folders(folder: Path) -> Case:
    for task in ("2023", "2024"):
        put(folder / task / "train.csv", cells(topic_rows(), ","))
        put(folder / task / "dev.csv", cells(topic_rows(32), ","))
    put(folder / "2024" / "test.csv", cells(topic_rows(32), ","))
    return folder, SEQUENTIAL, [
        "benchmark=folders", "2023: no test file: a quarter", "benchmark.splits.validation=dev",
        "also occur in train",
    ]  # fmt: skip


def files_per_task(folder: Path) -> Case:
    for name in ("books", "films"):
        put(folder / f"{name}.tsv", cells(topic_rows(text="review", label="sentiment"), "\t"))
    return folder, SEQUENTIAL, ["benchmark=folders", "a task for each of 2", "text=review label=sentiment"]


def class_folders(folder: Path) -> Case:
    for i, row in enumerate(topic_rows()):
        put(folder / row["label"] / f"{i}.txt", row["text"])
    put(folder / "law" / "empty.txt", "")
    return folder, SEQUENTIAL, ["a folder of texts for each label", "or as plain text", "an empty text (law/empty.txt)"]


def contradictions(folder: Path) -> Case:
    """Duplicates, equal texts with two labels, a rare label, similar labels, and a test label that train lacks."""
    rows = topic_rows()
    rows += [
        *rows[:5],
        {**rows[5], "label": "law"},
        {"text": "rare one", "label": "rare"},
        {"text": "sports", "label": "Sport "},
    ]
    put(folder / "train.csv", cells(rows, ","))
    put(folder / "test.csv", cells([*rows[:8], {"text": "new", "label": "unseen"}], ","))
    return folder, SEQUENTIAL, [
        "rows of train that repeat an earlier text and label: 5", f"equal texts with different labels: 1, such as {rows[5]['text'][:10]!r}"[:-1], "labels with fewer than 4 rows in train: 'Sport' (1), 'rare' (1)",
        "labels that do not occur in train cannot be learned: 'unseen'", "differ only in case", "test texts of files also occur in train",
    ]  # fmt: skip


def quotes_and_empty_lines(folder: Path) -> Case:
    lines = [f'"{row["text"]}, ""quoted""\r\nsecond line",{row["label"]}\r\n' for row in topic_rows()]
    text = "text,label\r\n\r\n" + "\r\n".join(lines) + "too,many,cells\r\n,food\r\n"
    return put(folder / "a'b, c.csv", text), SEQUENTIAL, ["row 97 has 3 cells instead of 2", "row 98 has an empty text"]


def prompts(folder: Path) -> Case:
    rows = [{"prompt": f"say {i} twice", "completion": f"{i} and {i}", "source": "ab"[i % 2]} for i in range(60)]
    return put(folder / "qa.jsonl", json_lines(rows)), ["model=tiny_llama", "benchmark.max_length=32"], [
        "objective=text_to_text", "text=prompt label=completion", "60 different answers in 60 rows"
    ]  # fmt: skip


def pairs(folder: Path) -> Case:
    rows = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    return put(folder / "pairs.jsonl", json_lines(rows)), ["model=tiny_llama"], ["objective=preference", "label=chosen"]


def conversations(folder: Path) -> Case:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(40)
    ]
    return put(folder / "chat.jsonl", json_lines(rows)), ["model=tiny_llama", "benchmark.max_target=16"], [
        "conversations in messages", "benchmark=chat"
    ]  # fmt: skip


def texts(folder: Path) -> Case:
    for name in ("sea", "sky"):
        put(folder / f"{name}.txt", "".join(f"{name} line {i} of a long text\n" for i in range(600)))
    return (
        folder,
        ["model=tiny_llama", "benchmark.max_length=64"],
        ["benchmark=text_domains", "benchmark.test_share=0.1"],
    )


def texts_in_a_table(folder: Path) -> Case:
    rows = [{"id": i, "body": f"line {i} of a long text"} for i in range(200)]
    return put(folder / "texts.csv", cells(rows, ";") + "too;many;cells\n"), ["model=tiny_llama", "benchmark.max_length=64"], [
        "read as plain text in body", "text=body", "1 bad rows are dropped",
    ]  # fmt: skip


def long_texts(folder: Path) -> Case:
    rows = [{**row, "text": f"{'word ' * 60} {row['text']}"} for row in topic_rows()]
    return put(folder / "long.csv", cells(rows, ",")), SEQUENTIAL, ["benchmark.max_length=384", "0/0/0"]


MAKERS: list[Callable[[Path], Case]] = [
    latin_1, tsv_without_header, nested_and_mixed, integers_in_parquet, json_array, task_folders, files_per_task,
    class_folders, contradictions, quotes_and_empty_lines, prompts, pairs, conversations, texts, texts_in_a_table, long_texts,
]  # fmt: skip


def from_file_to_run(maker: Callable[[Path], Case], tmp_path: Path, clpet) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    path, words, expected = maker(folder)
    shown = clpet("data", path.relative_to(tmp_path), *words)
    assert shown.code == 0, shown.out + shown.err
    for part in expected:
        assert part in shown.out, shown.out
    command = shlex.split(shown.out.splitlines()[-1])
    assert command[:2] == ["clpet", "train"]
    trained = clpet(*command[1:], *LIMITS)
    assert trained.code == 0, shown.out + trained.err
    assert list(tmp_path.glob("outputs/*/*/s*/results.json"))


def test_a_messy_file_is_trained_on_in_two_commands(tmp_path: Path, clpet) -> None:
    from_file_to_run(semicolons_with_a_mark, tmp_path, clpet)


def test_conversations_without_a_tokenizer(tmp_path: Path) -> None:
    path, _, expected = conversations(tmp_path)
    put(path, json_lines([{**row, "task": "ab"[i % 2]} for i, row in enumerate(map(json.loads, path.open()))]))
    text, works = survey_report(path, {"model.hub": "nobody/nothing"})
    assert works
    assert all(part in text for part in expected)
    assert "lengths are not measured: the tokenizer of qwen3_0_6b is not on this machine" in text
    assert "plain text" not in text
    assert "task  train  validation  test  tokens median" in text


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_every_kind_of_file_is_trained_on_in_two_commands(maker: Callable[[Path], Case], tmp_path: Path, clpet) -> None:
    from_file_to_run(maker, tmp_path, clpet)
