"""Which columns of a table are the text, the label and the task: hand-made columns."""

import pytest

from clpet.data.column_summary import ColumnSummary, column_summaries, summarize
from clpet.data.guess import Kind, label_score, labels_per_task, readings, task_candidates, text_score
from clpet.data.tabular_files import SplitRows

LONG = [f"a text of several words, number {i}" for i in range(40)]
FEW = ["red", "green", "blue", "grey"] * 10


def columns(**cells: list) -> list[ColumnSummary]:
    return [summarize(name, values) for name, values in cells.items()]


@pytest.mark.parametrize(("cells", "kind", "text", "label", "task"), [
    ({"text": LONG, "label": FEW}, Kind.labels, "text", "label", None),
    ({"id": list(range(40)), "y": [0, 1] * 20, "sentence": LONG}, Kind.labels, "sentence", "y", None),
    ({"body": LONG, "color": FEW, "intent": ["a", "b"] * 20}, Kind.labels, "body", "intent", None),
    ({"review": LONG, "color": FEW, "domain": ["a", "b"] * 20}, Kind.labels, "review", "color", "domain"),
    ({"q": LONG, "topic_id": [3, 4] * 20}, Kind.labels, "q", "topic_id", None),
    ({"title": LONG, "body": LONG[::-1], "class": FEW}, Kind.labels, "{title} {body}", "class", None),
    ({"question": LONG, "answer": [f"it is {i}" for i in range(40)]}, Kind.answers, "question", "answer", None),
    ({"question": LONG, "answer": ["yes", "no"] * 20}, Kind.labels, "question", "answer", None),
    ({"instruction": LONG, "input": ["", *LONG[1:]], "output": LONG}, Kind.answers, "{instruction} {input}", "output", None),
    ({"prompt": LONG, "chosen": LONG, "rejected": LONG}, Kind.preferences, "prompt", "chosen", None),
    ({"messages": [[{"role": "user", "content": "hi"}]] * 40, "label": FEW}, Kind.conversations, "messages", "", None),
    ({"text": LONG, "url": [f"u{i}" for i in range(40)]}, Kind.texts, "text", "", None),
])  # fmt: skip
def test_the_likeliest_reading(cells: dict, kind: Kind, text: str, label: str, task: str | None) -> None:
    best = readings(columns(**cells))[0]
    assert (best.kind, best.text, best.label, best.task) == (kind, text, label, task)


def test_other_readings_are_candidates_and_a_given_column_wins() -> None:
    table = columns(body=LONG, color=FEW, intent=["a", "b"] * 20)
    assert [(r.kind, r.label) for r in readings(table)] == [
        (Kind.labels, "intent"), (Kind.labels, "color"), (Kind.texts, "")
    ]  # fmt: skip
    assert readings(table, {"label": "color"})[0].label == "color"
    assert readings(table, {"text": "intent", "label": "color"})[0].text == "intent"
    assert readings(columns(n=list(range(40)))) == []


def test_scores_by_hand() -> None:
    """Label: 1, + 4 for its name, + 1 for at most 3 words, + 1 for at most a fifth distinct values."""
    label, text = columns(label=FEW, text=LONG)
    assert label_score(label) == 7
    assert label_score(text) == 0
    assert text_score(text) == pytest.approx(0.7 + 3 + 1)
    assert text_score(columns(n=["1", "2.5"] * 20)[0]) == 0
    assert label_score(columns(label=[0.5, 1.5] * 20)[0]) == 2 + 4 + 1
    assert label_score(columns(label=["a"] * 40)[0]) == 0


def test_a_task_column_has_a_name_and_few_values() -> None:
    table = columns(domain=FEW, year=[2020, 2021] * 20, color=FEW, source=LONG, language=["en", None] * 20)
    assert [column.name for column in task_candidates(table)] == ["domain", "year"]


@pytest.mark.parametrize(("labels", "size"), [(1, None), (3, None), (4, 2), (5, 3), (6, 2), (10, 2), (11, 3), (77, 16)])
def test_labels_are_divided_into_at_most_five_tasks(labels: int, size: int | None) -> None:
    assert labels_per_task(labels) == size


def test_keys_of_objects_are_columns() -> None:
    rows = [{"data": {"text": "a b", "meta": {"y": 1}}, "n": 1.0}, {"data": None, "n": None}]
    found = {column.name: column for column in column_summaries([SplitRows("f", {"data", "n"}, rows)])}
    assert set(found) == {"n", "data.text", "data.meta.y"}
    assert (found["data.text"].empty, found["data.text"].words, found["n"].types) == (1, 2.0, {"integer": 1})
