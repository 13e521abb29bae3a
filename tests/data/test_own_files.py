"""Files as people have them: separators, compression, other encodings, no header, one file, one file per task."""

import gzip
import json
from pathlib import Path

import pytest

from clpet.data.csv_files import missing_header, recognised_separator
from clpet.data.data_files import stem, suffix
from clpet.data.sources import Folders
from clpet.data.traits import LABELS
from clpet.errors import DataError
from tests.data.test_tabular_files import LINES, adds_up, domains, examples, labelled, notes, put, refused, table, write


def as_text(rows: list[dict], separator: str) -> str:
    return "".join(separator.join(map(str, line)) + "\n" for line in [rows[0], *[row.values() for row in rows]])


def contents(found) -> set[tuple[str, str]]:
    return {(example.text, example.target) for example in examples(found)}


EXPECTED = {(row["text"], row["label"]) for row in labelled()}


@pytest.mark.parametrize(("name", "content", "note"), [
    ("a.csv", as_text(labelled(), ";"), "separated by semicolons"),
    ("a.csv", as_text(labelled(), "|"), "separated by vertical bars"),
    ("a.csv", "sep=;\n" + as_text(labelled(), ";"), "separated by semicolons"),
    ("a.tsv", as_text(labelled(), "\t"), ""),
    ("A.TSV", as_text(labelled(), ","), "separated by commas"),
    ("a.csv.gz", as_text(labelled(), ","), ""),
    ("a.tsv.gz", as_text(labelled(), "\t"), ""),
    ("a.jsonl.gz", "".join(json.dumps(row) + "\n" for row in labelled()), ""),
    ("a.json.GZ", json.dumps(labelled()), ""),
])  # fmt: skip
def test_one_table_in_every_form(name: str, content: str, note: str, tmp_path: Path) -> None:
    """As a file and as the only file of a folder."""
    path = put(tmp_path / name, gzip.compress(content.encode()) if name.lower().endswith("gz") else content)
    for data in (path, tmp_path):
        found = table(data)
        assert contents(found) == EXPECTED
        assert note in notes(found)
        assert ("separated" in notes(found)) == bool(note)
        adds_up(found)


def test_a_separator_is_recognised_by_the_header_and_most_rows() -> None:
    assert recognised_separator("text,label\na;b,c\n", ",") == ","
    assert recognised_separator("text;label\na, b;c\n", ",") == ";"
    assert recognised_separator("text;label\n" + "a;b\n" * 9 + "a\n", ",") == ";"  # 10 of 11 rows are regular
    assert recognised_separator("a title; of a text\n" + "a line\n" * 9, ",") == ","
    assert recognised_separator("", ",") == ","


def test_a_first_row_of_values_is_no_header() -> None:
    assert missing_header([["good", "pos"], ["bad", "neg"], ["fine", "pos"], ["poor", "neg"], ["dull", "neg"]])
    assert not missing_header([["text", "label"], ["bad", "neg"], ["fine", "pos"], ["poor", "neg"]])
    assert not missing_header([["text", "label"]])


def test_suffixes_before_gz() -> None:
    assert [suffix(Path(name)) for name in ("a.csv.gz", "a.TXT.GZ", "a.tar.gz", "a.parquet.gz", "gz", "a.gz")] == [
        ".csv", ".txt", ".gz", ".gz", "", ".gz"
    ]  # fmt: skip
    assert [stem(Path(name)) for name in ("a.csv.gz", "a.b.txt", "a.tar.gz")] == ["a", "a.b", "a.tar"]


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv.gz", gzip.compress(as_text(labelled(), ",").encode())[:-12])
    assert "a.csv.gz cannot be decompressed" in refused(path)
    put(path, "text,label\n")
    assert "a.csv.gz cannot be decompressed" in refused(path)


def test_another_encoding_and_a_missing_header_are_options(tmp_path: Path) -> None:
    rows = "".join(f"café {i}\t{'ab'[i % 2]}\n" for i in range(24))
    path = put(tmp_path / "a.tsv", rows, "latin-1")
    assert "byte 0xe9 in line 1): convert it" in (error := refused(path))
    assert error.endswith("or set benchmark.encoding=cp1252")
    found = table(path, encoding="cp1252", header=["text", "label"])
    assert contents(found) == {(f"café {i}", "ab"[i % 2]) for i in range(24)}
    assert "(CP1252)" in notes(found)
    assert adds_up(found)["read"] == 24
    put(path, "a\tb\tc\n" + rows, "latin-1")
    assert "row 1 has 3 cells instead of 2" in refused(path, encoding="cp1252", header=["text", "label"])


def test_columns_inside_objects(tmp_path: Path) -> None:
    rows = [{"data": {"text": row["text"], "meta": {"label": row["label"]}}} for row in labelled()]
    for name in ("a.jsonl", "b.parquet"):
        path = write(tmp_path / name, rows)
        assert contents(table(path, text="data.text", label="data.meta.label")) == EXPECTED
        assert "has no column data.body" in refused(path, text="data.body")
    path = write(tmp_path / "a.jsonl", [*rows, {"data": {"text": "no label"}}, {"data": None}])
    assert "rows 25, 26 have no label" in refused(path, text="data.text", label="data.meta.label")


def test_one_split_of_a_folder_is_read_alone_with_a_note(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", labelled())
    assert f"test.csv next to it: data_dir={tmp_path} reads all splits" in notes(table(tmp_path / "train.csv"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "a.xlsx does not end in .parquet, .jsonl, .json, .csv, .tsv" in refused(put(tmp_path / "a.xlsx", "x"))
    with pytest.raises(DataError, match=r"a\.csv is not a folder$"):
        folders(write(tmp_path / "a.csv", labelled()))
    with pytest.raises(DataError, match="is not a folder or a file"):
        table(tmp_path / "nowhere")


def folders(path: Path):
    return Folders(name="folders", test_share=0.25).reading_for("made_up", LABELS).load(str(path))


def test_a_file_is_a_task_where_there_are_no_folders(tmp_path: Path) -> None:
    write(tmp_path / "news.csv", labelled())
    put(tmp_path / "shop.tsv.gz", gzip.compress(as_text(labelled(), "\t").encode()))
    write(tmp_path / "test.csv", labelled())
    found = folders(tmp_path)
    assert found.names == ["news", "shop"]
    assert found.labels == ["news: a", "news: b", "shop: a", "shop: b"]
    assert f"not read in {tmp_path}: test.csv" in notes(found)
    write(tmp_path / "deep" / "train.csv", labelled())
    assert folders(tmp_path).names == ["deep"]


def test_a_folder_of_texts_is_a_label(tmp_path: Path) -> None:
    """Without splits, and below train and test; empty texts are named by their file."""
    for label in "ab":
        for i in range(8):
            put(tmp_path / "one" / label / f"{i}.txt", f"{label} {i}\r\nmore\n")
            put(tmp_path / "two" / "train" / label / f"{i}.txt", f"{label} {i}")
            put(tmp_path / "two" / "test" / label / f"{i}.txt", f"{label} test {i}")
    found = table(tmp_path / "one")
    assert contents(found) == {(f"{label} {i}\nmore", label) for label in "ab" for i in range(8)}
    assert "the labels of" in notes(found)
    assert adds_up(found)["read"] == 16
    found = table(tmp_path / "two")
    assert {example.text for example in found.tasks[0].test} == {
        f"{label} test {i}" for label in "ab" for i in range(8)
    }
    put(tmp_path / "one" / "a" / "9.txt", " \n")
    assert "row 9 has an empty text (a/9.txt)" in refused(tmp_path / "one")
    assert len(examples(table(tmp_path / "one", skip_bad=True))) == 16


def test_plain_text_of_one_file_and_compressed(tmp_path: Path) -> None:
    text = "".join(LINES)
    one = put(tmp_path / "one" / "a.txt.gz", gzip.compress(text.replace("\n", "\r\n").encode()))
    rows = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    put(tmp_path / "two" / "b.jsonl.gz", gzip.compress(rows.encode()))
    plain = domains(put(tmp_path / "three" / "a.txt", text))
    assert domains(one).fingerprint() == plain.fingerprint()
    assert domains(one).names == ["a"]
    assert {example.text for example in examples(domains(tmp_path / "two"))} == set(LINES)


def test_a_table_of_texts_is_plain_text(tmp_path: Path) -> None:
    """One file of any kind of table; consecutive rows with the same id are one document."""
    for name in ("a.csv", "a.tsv.gz", "a.json"):
        lines = [line.strip() for line in LINES]
        separator = "\t" if "tsv" in name else ","
        content = as_text([{"doc_id": i // 2, "text": line} for i, line in enumerate(lines)], separator)
        if name == "a.json":
            content = json.dumps([{"doc_id": i // 2, "text": line} for i, line in enumerate(lines)])
        found = domains(put(tmp_path / name, gzip.compress(content.encode()) if "gz" in name else content))
        assert found.names == ["a"]
        assert {piece for example in examples(found) for piece in example.text.split("\n\n")} == set(lines)
        assert adds_up(found)["read"] == 30
    assert "has no column text" in refused(put(tmp_path / "b.csv", "body\nx\ny\n"), domains)
