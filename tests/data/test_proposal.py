"""The options that are proposed for a file or folder, without training."""

import json
from pathlib import Path

import pytest

from clpet.data.proposal import Proposal, default_name, hydra_value, propose
from clpet.data.sources.table import Table
from clpet.errors import DataError
from tests.data.test_tabular_files import LINES, labelled, put, write

TOPICS = [{"body": f"a text {i}", "topic": "abcd"[i % 4]} for i in range(40)]


def proposed(path: Path, **given: str) -> dict:
    return {key: value for key, value in propose(path, given).options.items() if key != "data_dir"}


def test_a_table_and_options_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "color": "xy"[i % 2]} for i, row in enumerate(TOPICS)])
    columns = {"benchmark": "files", "benchmark.text": "body", "benchmark.label": "topic"}
    assert proposed(path) == {**columns, "benchmark.classes_per_task": 2}
    color = propose(path, {"benchmark.label": "color"})
    assert color.options["benchmark.label"] == "color"
    assert "2 labels are too few to divide: one task" in color.reasons[-2]
    assert color.reasons[-1] == "column topic could name the task: add task=topic"
    assert proposed(path, objective="language_modeling")["benchmark"] == "text_domains"


def messages(category: str = "", message: str = "") -> list[dict]:
    """120 rows with columns message, category (four values) and area (three); a format replaces the values by row."""
    return [
        {
            "message": message.format(i) if message else f"a leak in the pipe number {i}",
            "category": category.format(i) if category else ["water", "wood", "light", "heat"][i % 4],
            "area": ["Bath", "Hall", "Roof"][i % 3],
        }
        for i in range(120)
    ]


def csv_file(path: Path, rows: list[dict], header: bool = True) -> Path:
    lines = [list(rows[0])] * header + [list(row.values()) for row in rows]
    return put(path, "".join(",".join(line) + "\n" for line in lines))


def test_a_column_that_could_name_the_task_is_named(tmp_path: Path) -> None:
    found = propose(csv_file(tmp_path / "a.csv", messages()), {})
    assert "column area could name the task: add task=area" in found.reasons
    assert not any("could name" in line for line in propose(tmp_path / "a.csv", {"benchmark.task": "area"}).reasons)


def test_numbers_are_not_labels_and_the_task_column_is_not_the_label(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", messages(category="{}.5"))
    reason = "column category has 120 different values in 120 rows: numbers are not labels"
    with pytest.raises(DataError, match=f"no column of labels for task=area; {reason}"):
        propose(path, {"benchmark.task": "area"})
    found = propose(path, {})
    assert (found.reading.label, found.problems) == ("area", [reason])
    given = propose(path, {"benchmark.task": "area", "benchmark.label": "category"})
    assert given.problems == [
        "every label occurs once: column category has 120 different values in 120 rows of train, so it does not hold labels"
    ]  # fmt: skip
    with pytest.raises(DataError, match="label=area is also the column of the task"):
        propose(path, {"benchmark.task": "area", "benchmark.label": "area"})
    with pytest.raises(DataError, match=r"task Bath .* no test examples: each of its 40 labels has a single example"):
        Table("own", text="message", label="category", task="area").load(str(path))


def test_wrong_columns_are_named_together(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", messages())
    with pytest.raises(DataError, match=r"no column categry; did you mean category\? and no column aera; did you mean"):
        propose(path, {"benchmark.label": "categry", "benchmark.task": "aera"})
    with pytest.raises(DataError, match=r"a\.csv has no column mesage; did you mean message\?$"):
        propose(path, {"benchmark.text": "mesage"})
    with pytest.raises(DataError, match=r"t\.txt is read as plain text, without labels and tasks: remove label=a"):
        propose(put(tmp_path / "t.txt", "".join(LINES)), {"benchmark.label": "a"})
    with pytest.raises(DataError, match=r"no column a and no column b; available: area, category, message$"):
        propose(path, {"benchmark.label": "a", "benchmark.task": "b"})


def test_a_text_column_without_texts_is_named(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", messages(message=" "))
    with pytest.raises(DataError, match=r"no column of text; .*; column message is empty in all 120 rows"):
        propose(path, {})
    rows = [{**row, "note": ""} for row in messages()]
    assert propose(csv_file(tmp_path / "b.csv", rows), {}).problems == ["column note is empty in all 120 rows"]


def test_columns_without_a_header_are_named_by_their_values(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", messages(), header=False)
    found = propose(path, {})
    assert found.options["benchmark.header"] == ["text", "label", "task"]
    assert (found.reading.label, found.reading.task) == ("label", "task")
    with pytest.raises(
        DataError,
        match=r"no column message and no column category, and .* values: .* benchmark\.header=\[NAME,NAME,NAME\]",
    ):
        Table("own", text="message", label="category").load(str(path))
    with pytest.raises(DataError, match=r"no column message; available: label, task, text; .* has no header row"):
        propose(path, {"benchmark.text": "message"})


def test_a_task_column_with_empty_cells_is_only_named(tmp_path: Path) -> None:
    rows = [{**row, "domain": None if i == 7 else "xy"[i % 2]} for i, row in enumerate(TOPICS)]
    found = propose(write(tmp_path / "a.jsonl", rows), {})
    assert "benchmark.task" not in found.options
    assert "domain may name the task, but 1 cells are empty (task=domain)" in found.reasons
    rows[7]["domain"] = "x"
    assert proposed(write(tmp_path / "a.jsonl", rows))["benchmark.task"] == "domain"


def test_folders_with_few_texts_are_domains(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(4):
            put(tmp_path / "x" / label / f"{i}.txt", f"{label} {i}")
    assert proposed(tmp_path / "x")["benchmark"] == "text_domains"
    assert proposed(tmp_path / "x", benchmark="files")["benchmark"] == "files"
    for label in "ab":
        put(tmp_path / "x" / label / "4.txt", f"{label} 4")
    assert proposed(tmp_path / "x") == {"benchmark": "files"}


def test_a_folder_of_many_texts_is_one_domain(tmp_path: Path) -> None:
    for i in range(21):
        put(tmp_path / "x" / f"{i}.txt", LINES[i])
    found = propose(tmp_path / "x", {})
    assert found.options["data_dir"] == tmp_path
    assert found.options["benchmark.domains"] == ["x"]
    (tmp_path / "x" / "0.txt").unlink()
    assert propose(tmp_path / "x", {}).options["data_dir"] == tmp_path / "x"


def test_a_table_without_labels_next_to_texts_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "x" / "a.txt", "".join(LINES))
    put(tmp_path / "x" / "d.json", json.dumps([{"text": line} for line in LINES]))
    assert proposed(tmp_path / "x")["benchmark"] == "text_domains"
    with pytest.raises(DataError, match=r"\.json is not read as plain text"):
        propose(put(tmp_path / "y" / "train.json", json.dumps([{"text": line} for line in LINES])).parent, {})


@pytest.mark.parametrize(("encoding", "proposal"), [
    ("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("cp1252", "cp1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")
])  # fmt: skip
def test_encodings(encoding: str, proposal: str | None, tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"{row['text']} é,{row['label']}\n" for row in labelled())
    assert proposed(put(tmp_path / "a.csv", text, encoding)).get("benchmark.encoding") == proposal


def test_plain_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "text\n" + "".join(f"{line.strip()} é\n" for line in LINES), "latin-1")
    with pytest.raises(DataError, match=r"invalid bytes in 60 lines.*Files of plain text are read as UTF-8"):
        propose(path, {})


def test_files_without_a_train_split_are_refused(tmp_path: Path) -> None:
    for name in ("test.csv", "dev.csv"):
        write(tmp_path / name, labelled())
    with pytest.raises(DataError, match=r"has no train file, only dev\.csv, test\.csv"):
        propose(tmp_path, {})
    write(tmp_path / "train.csv", labelled())
    write(tmp_path / "valid.csv", labelled())
    with pytest.raises(DataError, match=r"has dev\.csv, valid\.csv for validation"):
        propose(tmp_path, {})


def test_values_in_hydras_grammar() -> None:
    assert hydra_value(["a b", "c"]) == "['a b',c]"
    assert [hydra_value(value) for value in (True, None, 2, "null", "1e5", "{a} {b}")] == [
        "true", "null", "2", "'null'", "'1e5'", "'{a} {b}'"
    ]  # fmt: skip
    assert [hydra_value(Path(path), "data_dir") for path in ("a b=(c)", "a,b", "it's")] == [
        "a b=(c)",
        "'a,b'",
        r"'it\'s'",
    ]


def test_a_name_that_is_a_reference_is_refused() -> None:
    """A configuration would put a variable of the environment in its place."""
    with pytest.raises(DataError, match="which a configuration reads as a reference"):
        hydra_value("${oc.env:HOME}")


def test_names_of_benchmarks(tmp_path: Path) -> None:
    assert default_name(put(tmp_path / "My Données.v2.csv.gz", "")) == "my_donn_es_v2"
    assert default_name(tmp_path / "???") == "mine"


def test_words_of_a_proposal(tmp_path: Path) -> None:
    found: Proposal = propose(write(tmp_path / "a.jsonl", TOPICS), {})
    assert found.words()[-1] == "benchmark.classes_per_task=2"
