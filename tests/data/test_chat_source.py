"""Conversations from files: layouts, rows of messages or of prompts and answers, and rows that are refused."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clpet.data.benchmark import Turns
from clpet.data.conversation import (
    checked_tools,
    conversation,
    conversation_of,
    example_of,
    question,
    without_oldest,
)
from clpet.data.sources.chat import Chat
from clpet.data.traits import ANSWERS
from clpet.errors import ConfigError, DataError
from clpet.evaluation.data_inspection import key
from clpet.evaluation.text_prediction import as_examples

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "tide", "arguments": {"town": "Cork"}}}


def load(folder: Path, **options):
    source = Chat(name="chat", validation_share=0.0, **options).reading_for("text_to_text", ANSWERS)
    return source.load(str(folder))


def write(folder: Path, rows: list, name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def talks(count: int) -> list:
    return [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(count)]


def test_one_table_has_a_task_or_a_column_of_them(tmp_path: Path) -> None:
    write(tmp_path / "one", [{"messages": talk} for talk in talks(8)])
    benchmark = load(tmp_path / "one")
    assert [(task.name, len(task.train), len(task.test)) for task in benchmark.tasks] == [("chat", 6, 2)]
    assert benchmark.chat is Turns.all
    write(tmp_path / "two", [{"messages": talk, "task": "ab"[n % 2]} for n, talk in enumerate(talks(8))])
    assert load(tmp_path / "two").names == ["a", "b"]
    assert load(tmp_path / "two", task=None).names == ["chat"]
    assert load(tmp_path / "two" / "train.jsonl").names == ["a", "b"]


def test_folders_are_tasks(tmp_path: Path) -> None:
    for name in ("tides", "metals"):
        write(tmp_path / name, [{"messages": talk} for talk in talks(4)])
        write(tmp_path / name, [{"messages": talk} for talk in talks(2)], "test.jsonl")
    benchmark = load(tmp_path, order=["tides", "metals"])
    assert [(task.name, len(task.train), len(task.test)) for task in benchmark.tasks] == [
        ("tides", 4, 2),
        ("metals", 4, 2),
    ]


def test_prompts_and_answers_are_conversations_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "answer": f"a{n}", "system": "Be brief." if n else None} for n in range(4)]
    example = load(write(tmp_path, rows)).tasks[0].train[1]
    assert (example.text, example.target) == (f"q{example.text[1:]}", f"a{example.text[1:]}")
    assert json.loads(example.fields["messages"]) == [SYSTEM, {"role": "user", "content": example.text}]
    rows = [{"messages": talk, "system": "Be brief."} for talk in talks(4)]
    assert load(write(tmp_path, rows)).tasks[0].train[0].fields["messages"].startswith(json.dumps([SYSTEM])[:-1])
    assert example.origin == f"{tmp_path / 'train.jsonl'}, row {int(example.text[1:]) + 1}"


def test_messages_in_csv_and_parquet(tmp_path: Path) -> None:
    """csv cells hold JSON; parquet gives every message all keys, with null for those that it does not have."""
    talk = [SYSTEM, USER, {**ANSWER, "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "noon"}, ANSWER]
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *[[json.dumps(talk)]] * 4])
    (tmp_path / "b").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"messages": [talk] * 4}), tmp_path / "b" / "train.parquet")
    csv_task, parquet_task = load(tmp_path).tasks
    assert [csv_task.train[0]] * 3 == list(csv_task.train) == list(parquet_task.train)
    assert conversation_of(csv_task.train[0], "").messages == talk[:-1]


def test_an_example_has_all_of_its_conversation() -> None:
    """What a memory, a fingerprint and a comparison of examples read: text, target and fields."""
    talk = [
        SYSTEM,
        USER,
        ANSWER,
        {"role": "user", "content": "and then?"},
        {**ANSWER, "tool_calls": [CALL], "content": ""},
    ]
    example = example_of(conversation(talk, [{"type": "function"}]))
    assert example.text == "and then?"
    assert example.target == json.dumps([CALL])
    assert conversation_of(example, "") == (talk[:-1], talk[-1], [{"type": "function"}])
    other = example_of(conversation([*talk[:2], {**ANSWER, "content": "hu"}, *talk[3:]]))
    assert key(other) != key(example)
    assert conversation_of(example_of(question(talk[:-1])), "") == (talk[:-1], None, None)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a conversation without messages"),
        ("hello", "messages that are not JSON"),
        ({"role": "user"}, "messages that are not a list"),
        (["hello"], "a message 1 that is not an object with role and content"),
        (
            [{"from": "human", "value": "hi"}],
            r"a message 1 without a role \(rename from and value to role and content\)",
        ),
        (
            [USER, {"role": "bot", "content": "ho"}],
            "a message 2 with the role 'bot', which is not one of system, developer, user",
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "text"}]}],
            r"a message 2 \(assistant\) whose content is not a text",
        ),
        ([{"role": "user", "content": " "}, ANSWER], r"an empty content in message 1 \(user\)"),
        ([USER, {"role": "assistant"}], r"an empty content in message 2 \(assistant\)"),
        ([USER], "a conversation without an assistant turn"),
        ([USER, ANSWER, USER], "a conversation that ends with a user turn instead of an answer"),
        ([SYSTEM, ANSWER], "a conversation without a user turn before its answer"),
    ],
)
def test_rows_that_are_refused(messages: object, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, [{"messages": talk} for talk in [*talks(4), messages]])
    with pytest.raises(DataError, match=rf"train.jsonl: row 5 has {message}"):
        load(folder)
    assert len(load(folder, skip_bad=True).tasks[0].train) == 3


def test_tables_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column prompt"):
        load(write(tmp_path / "a", [{"question": "q", "answer": "a"}]))
    with pytest.raises(DataError, match="rows 1, 2 have tools that are not a list of JSON schemas"):
        load(write(tmp_path / "b", [{"messages": [USER, ANSWER], "tools": ["x"]}] * 2))
    with pytest.raises(DataError, match="row 2 has no task"):
        load(write(tmp_path / "c", [{"messages": [USER, ANSWER], "task": name} for name in ("a", "")]))
    with pytest.raises(DataError, match="row 1 has a system message in messages and one in system"):
        load(write(tmp_path / "d", [{"messages": [SYSTEM, USER, ANSWER], "system": "x"}, {"messages": [USER, ANSWER]}]))
    with pytest.raises(DataError, match="is read from local files: set data_dir=FOLDER"):
        Chat(name="chat").reading_for("text_to_text", ANSWERS).load(None)
    with pytest.raises(ConfigError, match=r"benchmark\.chat must be all or last with conversations, not null"):
        Chat(chat=None)


def test_new_conversations_to_answer(tmp_path: Path) -> None:
    source = Chat(name="chat").reading_for("text_to_text", ANSWERS)
    benchmark = source.load(str(write(tmp_path, [{"messages": talk} for talk in talks(8)])))
    examples = as_examples(
        ["hi", [SYSTEM, USER], {"messages": [USER], "tools": [{"type": "function"}]}], benchmark, source, None
    )
    found = [conversation_of(example, example.text) for example in examples]
    assert [talk.messages for talk in found] == [[USER], [SYSTEM, USER], [USER]]
    assert found[2].tools == [{"type": "function"}]
    for talk, message in [
        ([USER, ANSWER], "is a conversation that ends with an assistant turn"),
        ({"messages": []}, "is a conversation without messages"),
        ({"messages": [USER], "more": 4}, "is not a row of messages and tools"),
    ]:
        with pytest.raises(ConfigError, match=message):
            as_examples([talk], benchmark, source, None)


@pytest.mark.parametrize(
    ("cell", "reason"), [("[" * 50_000, "not JSON"), ('[{"role": "user", "content": "\\ud800"}]', "not JSON")]
)
def test_cells_that_are_no_conversation_are_data_errors(cell: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        checked_tools(cell)


def test_system_messages_inside_a_conversation_are_kept() -> None:
    roles = ["user", "assistant", "system", "user"]
    turns = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    assert without_oldest(turns) == [turns[2], turns[3]]
