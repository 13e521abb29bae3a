"""Files as people have them: what cannot be used is named, what is repaired or left out is said, counted and recorded."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.data_files import file_name
from clpet.data.document_readers import JsonLinesReader, LongText, TextFiles, open_readers
from clpet.data.documents import Documents
from clpet.data.read_report import account
from clpet.data.sources import Folders, Kind, Table
from clpet.data.sources.text_domains import TextDomains
from clpet.data.splits import stratified
from clpet.errors import DataError
from clpet.evaluation.data_inspection import inspect_data

LINES = [f"line {i} of a text that is long enough to be a document\n" for i in range(60)]


def put(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    """Writes a file and the folders above it; line ends stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def labelled(count: int = 24, **more: object) -> list[dict]:
    """Rows of two labels."""
    return [{"text": f"text {i}", "label": "ab"[i % 2], **more} for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as csv, parquet or jsonl, as the suffix says; None is an empty cell."""
    if path.suffix == ".csv":
        cells = [list(rows[0]), *([row.get(key) for key in rows[0]] for row in rows)]
        return put(path, "".join(",".join("" if c is None else f'"{c}"' for c in line) + "\n" for line in cells))
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(folder: Path, **options: object) -> Benchmark:
    """A folder of tables as a benchmark."""
    return Table(name="files", **options).load(str(folder))  # type: ignore[arg-type]


def domains(folder: Path, **options: object) -> Benchmark:
    """A folder of text as a benchmark of domains."""
    return TextDomains(name="text_domains", test_share=0.2, **options).load(str(folder))  # type: ignore[arg-type]


def refused(folder: Path, load=table, **options: object) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(DataError) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def examples(benchmark: Benchmark) -> list[Example]:
    """All examples of all splits."""
    return [
        example
        for task in benchmark.tasks
        for split in ("train", "validation", "test")
        for example in task.split(split)
    ]


def notes(benchmark: Benchmark) -> str:
    """What every command says of how the data was read."""
    return "\n".join(inspect_data(benchmark)["warnings"])


def adds_up(benchmark: Benchmark) -> dict:
    """The record of a reading, whose counts add up."""
    record = inspect_data(benchmark)["read"]
    assert record["read"] - sum(record.get("dropped", {}).values()) == record["kept"]
    return record


def text_of(documents) -> str:
    return "".join(example.text for example in documents)


# Empty cells


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_empty_cell_is_an_empty_text_in_a_prompt_and_a_complaint_elsewhere(suffix: str, tmp_path: Path) -> None:
    """null, an absent key, spaces and a missing number are all empty, in every format; nowhere the word None."""
    rows = [{**row, "title": f"title {i}" if i % 2 else None, "dom": "ab"[i % 2]} for i, row in enumerate(labelled())]
    write(tmp_path / "t" / f"train.{suffix}", rows)
    found = table(tmp_path / "t", text="{title} {text}")
    assert sorted(e.text for e in examples(found))[:12] == sorted(f" text {i}" for i in range(0, 24, 2))
    assert "12 empty cells are read as an empty text: column title" in notes(found)
    written = table(tmp_path / "t", objective=Kind.text_to_text, prompt="{title}: {text}")
    assert {e.fields["title"] for e in examples(written)} == {"", *(f"title {i}" for i in range(1, 24, 2))}
    for column, options, words in (
        ("text", {}, "an empty text"),
        ("label", {}, "no label"),
        ("label", {"objective": Kind.text_to_text}, "no label"),
        ("dom", {"task": "dom"}, "no task"),
    ):
        for hole in (None, "", "  "):
            bad = [{**row, column: hole} if i in (2, 5) else row for i, row in enumerate(rows)]
            write(tmp_path / "bad" / f"train.{suffix}", bad)
            assert f"rows 3, 6 have {words}" in refused(tmp_path / "bad", **options)


def test_missing_numbers_are_empty_and_lists_are_not_texts(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    values = {
        "text": [f"t{i}" for i in range(12)],
        "label": [float("nan"), *([1.0, 2.0] * 5), 1.0],
        "n": [None, *range(11)],
    }
    pyarrow.parquet.write_table(pyarrow.table(values), path)
    assert "row 1 has no label" in refused(tmp_path)
    found = table(tmp_path, skip_bad=True, text="{n} {text}")
    assert found.labels == ["1", "2"]
    assert "10 t11" in {e.text for e in examples(found)}
    write(tmp_path / "lists" / "train.jsonl", [{**row, "title": ["a"]} for row in labelled()])
    message = refused(tmp_path / "lists", text="{title} {text}")
    assert "rows 1, 2, 3, 4, 5 and 19 more have a list in column title" in message


# Bad rows


def test_all_bad_rows_are_named_at_once_or_dropped_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in labelled(40)]
    lines[3] = '{"text": "x", "label": }'
    lines[5] = '["no", "object"]'
    lines[7] = lines[8] = '{"text": " ", "label": "a"}'
    lines[11] = '{"text": "x", "label": {"deep": 1}}'
    lines[12] = '{"text": "x", "label": "a", "label": "b"}'
    lines[13] = '{"text": "\\ud800", "label": "b"}'
    put(tmp_path / "train.jsonl", "\n".join(lines))
    write(tmp_path / "test.jsonl", [*labelled(6), {"text": "x"}])
    message = refused(tmp_path)
    for part in ("row 4 has invalid JSON (Expecting value, column ", "row 6 has a value that is not an object",
                 "row 13 has the key label twice", "row 14 has half of a character", "and 1 more", "test.jsonl: row 7 has no label",
                 "benchmark.skip_bad=true"):  # fmt: skip
        assert part in message
    assert len(message) < 700
    found = table(tmp_path, skip_bad=True)
    assert adds_up(found) == {
        "unit": "rows",
        "read": 47,
        "kept": 39,
        "dropped": {"bad": 8},
        "notes": found.report.other_notes,
    }
    assert "8 bad rows are dropped" in notes(found)


def test_csv_rows_of_another_width_and_quotes_that_swallow_rows(tmp_path: Path) -> None:
    put(tmp_path / "a" / "train.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)) + "only\nx,1,2\n")
    message = refused(tmp_path / "a")
    assert "row 21 has 1 cells instead of 2; row 22 has 3 cells instead of 2" in message
    assert adds_up(table(tmp_path / "a", skip_bad=True))["dropped"] == {"bad": 2}
    rows = [f"t{i},{i % 2}\n" for i in range(20)]
    put(tmp_path / "open" / "train.csv", "text,label\n" + "".join(rows) + '"never closed,1\n' + "".join(rows))
    assert "a quote that is not closed? it spans 21 lines" in refused(tmp_path / "open")
    rows[4], rows[9] = '"stray,0\n', 'end",1\n'
    put(tmp_path / "stray" / "train.csv", "text,label\n" + "".join(rows))
    assert "column text of row 5 spans 6 lines, of which 5 look like rows" in notes(table(tmp_path / "stray"))
    put(tmp_path / "long" / "train.csv", f'text,label\n"{"word, " * 500_000}",0\n' + "".join(rows[:4]))
    assert max(len(e.text) for e in examples(table(tmp_path / "long"))) == 3_000_000


def test_what_was_read_and_what_was_left_out_add_up(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 6}", "dom": f"d{i % 3}", "keep": i % 4 > 0} for i in range(240)]
    write(tmp_path / "train.jsonl", rows)
    found = table(
        tmp_path, task="dom", tasks=["d1", "d0"], drop_labels=["l0"], where={"keep": "true"}, max_train=20, max_test=4
    )
    record = adds_up(found)
    assert record["read"] == 240
    assert set(record["dropped"]) == {"benchmark.where", "benchmark.drop_labels", "in tasks that are not learned",
                                      "beyond benchmark.max_train", "beyond benchmark.max_test"}  # fmt: skip
    assert account(record).startswith("rows: 240 read - 60 benchmark.where - 20 benchmark.drop_labels - ")


def test_a_limited_test_set_keeps_the_proportions_of_its_labels() -> None:
    """Of 70, 20 and 10 per cent, ten are 7, 2 and 1; the rest goes to the largest remainders; train stays even."""
    whole = [Example(str(i), "a" if i < 70 else "b" if i < 90 else "c") for i in range(100)]
    for most, counts in ((10, [7, 2, 1]), (4, [3, 1, 0]), (100, [70, 20, 10]), (15, [11, 3, 1])):
        part = stratified(whole, most)
        assert [sum(e.target == label for e in part) for label in "abc"] == counts
        assert part == stratified(whole, most) == sorted(part, key=lambda e: int(e.text))
    assert len(stratified(whole, 7, labelled=False)) == 7


# Columns


def test_columns_that_cannot_be_meant_are_refused_and_padded_names_are_read(tmp_path: Path) -> None:
    for name, header in (("twice", "text,label,label"), ("padded", "text,label, text")):
        put(tmp_path / name / "train.csv", header + "\n" + "a,b,c\n" * 8)
        assert f"has the column {'label' if name == 'twice' else 'text'} twice" in refused(tmp_path / name)
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["x", "x"]), tmp_path / "parquet" / "train.parquet")
    assert "has the column x twice" in refused(tmp_path / "parquet")
    put(tmp_path / "space" / "train.csv", "text, label\n" + "".join(f"t{i}, {i % 2}\n" for i in range(20)))
    found = table(tmp_path / "space")
    assert found.labels == ["0", "1"]
    assert "spaces are removed from the column names [' label']" in notes(found)
    write(tmp_path / "json" / "train.jsonl", [{" label": "a", "text": "b"}])
    assert "has no column label; did you mean ' label'?" in refused(tmp_path / "json")


@pytest.mark.parametrize(
    "whole",
    [
        {"text": ["word " * 40] * 500, "label": ["a"] * 500},
        {"text": {"0": "a"}, "label": {"0": "b"}},
        {"data": [{"text": "a", "label": "b"}]},
    ],
)
def test_a_table_written_by_column_gets_a_short_line(whole: dict, tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        put(tmp_path / str(number) / "train.json", json.dumps(whole, indent=indent))
        message = refused(tmp_path / str(number))
        assert "a list of rows, or one row per line, is expected" in message
        assert len(message) < 300 + len(str(tmp_path))


def test_values_in_messages_are_cut_and_escaped(tmp_path: Path) -> None:
    huge = "\x1b[31m" + "x" * 10_000
    write(tmp_path / "label" / "train.jsonl", [{"text": "a", "label": [huge]}])
    write(tmp_path / "unseen" / "train.jsonl", labelled())
    write(tmp_path / "unseen" / "test.jsonl", [{"text": "a", "label": huge}])
    write(tmp_path / "column" / "train.jsonl", [{huge: "a", **{f"c{i}": "b" for i in range(500)}}])
    for name in ("label", "unseen", "column"):
        message = refused(tmp_path / name)
        assert "\x1b" not in message
        assert len(message) < 600 + len(str(tmp_path))


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be-bom", "utf-32", "utf-8-sig"])
def test_encodings_with_a_byte_order_mark_are_decoded(encoding: str, tmp_path: Path) -> None:
    """Tables, several text files and a single one alike; what is not UTF-8 is said."""

    def encoded(text: str) -> bytes:
        return b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding)

    lines = [line.replace("text", "téxt 日本") for line in LINES]
    put(tmp_path / "csv" / "train.csv", encoded("text,label\n" + "".join(f"é{i},{i % 2}\n" for i in range(20))))
    put(tmp_path / "json" / "train.json", encoded(json.dumps(labelled(), ensure_ascii=False)))
    for i in range(4):
        put(tmp_path / "text" / "several" / f"{i}.txt", encoded("".join(lines[i::4])))
    put(tmp_path / "text" / "single.txt", encoded("".join(lines)))
    found = [table(tmp_path / "csv"), table(tmp_path / "json"), domains(tmp_path / "text")]
    assert "é0" in {example.text for example in examples(found[0])}
    several, single = found[2].tasks
    assert sorted("".join(text_of(several.split(s)) for s in ("train", "validation", "test"))) == sorted("".join(lines))
    assert text_of(single.train) + text_of(single.validation) + text_of(single.test) == "".join(lines)
    for benchmark in found:
        assert ("decoded by their byte order mark" in notes(benchmark)) == (encoding != "utf-8-sig")


def test_bytes_without_an_encoding_are_refused_in_tables_and_counted_in_text(tmp_path: Path) -> None:
    put(tmp_path / "latin" / "train.csv", b"text,label\na,b\ncaf\xe9,b\n")
    assert "train.csv is not UTF-8 (byte 0xe9 in line 3): convert it, for example with iconv -f LATIN1" in refused(
        tmp_path / "latin"
    )
    put(tmp_path / "bare" / "train.csv", "text,label\na,b\n".encode("utf-16-le"))
    assert "UTF-16 without a byte order mark?" in refused(tmp_path / "bare")
    put(tmp_path / "nul" / "a.txt", "".join(LINES).encode("utf-16-le"))
    assert "a.txt is not UTF-8" in refused(tmp_path / "nul", domains)
    for i in range(4):
        put(tmp_path / "text" / "several" / f"{i}.txt", "".join(LINES[i::4]).encode() + b"caf\xe9 \xe8t\xe9")
    put(tmp_path / "text" / "single.txt", "".join(LINES).encode() + b"caf\xe9 \xe8t\xe9")
    found = domains(tmp_path / "text")
    assert "15 invalid UTF-8 bytes were replaced by U+FFFD" in notes(found)
    assert f"{tmp_path / 'text' / 'single.txt'} (3)" in notes(found)
    assert sum(adds_up(found)["replaced"].values()) == 15
    put(tmp_path / "rows" / "a" / "all.jsonl", json.dumps({"text": "x"}).encode("utf-16") + b"\n")
    assert "all.jsonl is not UTF-8" in refused(tmp_path / "rows", domains)
    assert "�" not in text_of(Documents.of(TextFiles([put(tmp_path / "real.txt", "a � b".replace("�", "b"))])))


def test_a_replacement_character_of_the_text_is_not_counted(tmp_path: Path) -> None:
    reader = LongText(put(tmp_path / "a.txt", "kept \ufffd\n" * 9 + "é\n"))
    assert text_of(Documents.of(reader)).count("\ufffd") == 9
    assert not +reader.report.replaced


# Line ends


def test_windows_line_ends_are_removed_by_every_reader(tmp_path: Path) -> None:
    text = "".join(LINES[:40])
    windows = text.replace("\n", "\r\n")
    rows = [{"text": windows, "doc_id": f"d{i}"} for i in range(2)]
    files = [
        put(tmp_path / "one.txt", windows),
        write(tmp_path / "rows.jsonl", rows),
        write(tmp_path / "rows.parquet", rows),
    ]
    found = [Documents.of(*open_readers([path], "text", "doc_id")) for path in files]
    found.append(Documents.of(TextFiles([put(tmp_path / "two.txt", windows)])))
    assert [text_of(part) == text * count for part, count in zip(found, (1, 2, 2, 1), strict=True)] == [True] * 4
    for part in found:
        (report,) = {id(reader.report): reader.report for reader in part.corpus.readers}.values()
        assert report.line_ends.total() == 40 * len(part) or part is found[0]
        assert text_of([part[len(part) - 1]])[-1] == "\n"  # read once more, at its place
    for suffix in ("csv", "jsonl", "parquet"):
        write(tmp_path / suffix / f"train.{suffix}", [{**row, "text": f"a\r\n{row['text']}"} for row in labelled()])
        assert {e.text[:3] for e in examples(table(tmp_path / suffix))} == {"a\nt"}
    put(tmp_path / "dos" / "train.csv", b"text,label\r\n" + b"".join(b"t%d,%d\r\n" % (i, i % 2) for i in range(20)))
    assert table(tmp_path / "dos").labels == ["0", "1"]


def test_a_line_end_is_not_cut_in_two(tmp_path: Path) -> None:
    """A line of more than STRETCH bytes is cut; its CRLF may lie on both sides."""
    from clpet.data.document_readers import LONGEST_LINE, PIECE

    for size in range(PIECE + LONGEST_LINE - 2, PIECE + LONGEST_LINE + 2):
        path = put(tmp_path / f"{size}.txt", b"x" * size + b"\r\nend")
        assert text_of(Documents.of(LongText(path))) == "x" * size + "\nend"


# Files


def test_hidden_files_are_ignored_and_others_are_named(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "a" / f"{i}.txt", "".join(LINES[i::4]))
    put(tmp_path / "b.TXT", "".join(LINES))
    for name in ("._b.txt", ".ipynb_checkpoints/b-checkpoint.txt", "a/._0.txt", "a/.git/x.txt", ".DS_Store"):
        put(tmp_path / name, "hidden")
    for name in ("d.json", "f.md", "a/notes.docx", "sub/only.pdf", "a/README.md", "LICENSE"):
        put(tmp_path / name, "unread")
    put(tmp_path / "e.txt.gz", gzip.compress(b"text"))
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "link.txt")
    found = domains(tmp_path)
    assert found.names == ["a", "b"]
    assert f"not read in {tmp_path}: a/notes.docx, d.json, e.txt.gz, f.md, link.txt and 1 more" in notes(found)
    assert adds_up(found)["unread"] == {
        str(tmp_path): {"count": 6, "names": ["a/notes.docx", "d.json", "e.txt.gz", "f.md", "link.txt", "sub/"]}
    }


def test_unread_files_beside_tables_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.CSV".lower(), labelled())
    (tmp_path / "train.csv").rename(tmp_path / "train.CSV")
    for name in ("dev.csv", "notes.txt", "more/x.csv", ".train.csv"):
        put(tmp_path / name, "x")
    assert f"not read in {tmp_path}: dev.csv, more/, notes.txt" in notes(table(tmp_path))


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        write(tmp_path / "t" / f"train.{suffix}", labelled())
    assert "has train.csv and train.parquet for one split" in refused(tmp_path / "t")
    put(tmp_path / "d" / "a.txt", "x"), put(tmp_path / "d" / "a" / "b.txt", "x")
    assert "a/ and a.txt would both be the domain a" in refused(tmp_path / "d", domains)
    put(tmp_path / "s" / "a" / "train.txt", "x"), put(tmp_path / "s" / "a" / "train.jsonl", '{"text": "x"}')
    assert "a/train.jsonl and a/train.txt have the same name" in refused(tmp_path / "s", domains)


@pytest.mark.parametrize("name", ["test", "validation", "dev", "Test", "test-00000-of-00001", "valid_1"])
def test_a_lone_test_file_is_not_the_train_file(name: str, tmp_path: Path) -> None:
    write(tmp_path / "t" / f"{name}.jsonl", labelled())
    assert f"has only {name}.jsonl: a {'test' if 'est' in name else 'validation'} file is not used as train" in refused(
        tmp_path / "t"
    )
    put(tmp_path / "d" / "a" / f"{name}.txt", "".join(LINES))
    assert f"{name}.txt has no train file next to it" in refused(tmp_path / "d", domains)


def test_text_rows_that_are_not_text_are_named_at_once_or_dropped(tmp_path: Path) -> None:
    good = [json.dumps({"text": line}) for line in LINES]
    bad = [
        '{"text": 3}',
        '{"text": ["x"]}',
        '{"txt": "x"}',
        '{"text": ',
        '"text"',
        '{"text": "\\ud800"}',
        '{"text": null}',
        "",
    ]
    put(tmp_path / "a.jsonl", "\n".join([*good, *bad]) + "\n")
    message = refused(tmp_path, domains)
    for part in (
        "row 61 has a int in column text",
        "row 62 has a list",
        "row 63 has no text; did you mean txt?",
        "row 64 has invalid JSON",
    ):
        assert part in message
    found = domains(tmp_path, skip_bad=True)
    assert adds_up(found)["dropped"]["without text"] == len(bad)
    assert text_of(found.tasks[0].train) + text_of(found.tasks[0].validation) + text_of(found.tasks[0].test)
    reader = JsonLinesReader(tmp_path / "a.jsonl", "text", "doc_id")
    assert [reader.read(unit.position, unit.span) == unit.pieces for unit in reader.scan()] == [True] * 68


def test_documents_that_were_read_and_left_out_add_up(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {line}"} for line in LINES] + [{"text": " "}])
    record = adds_up(domains(tmp_path, max_train=9, max_test=3, base="a", max_base=5))
    assert (record["unit"], record["read"], record["dropped"]["without text"]) == ("documents", 183, 3)
    adds_up(domains(tmp_path, tasks=["a", "b"], order="similar", reference="c", order_encoder="hashed"))


# A folder per task


def test_a_folder_per_task_is_discovered(tmp_path: Path, clpet) -> None:
    for name, suffix in (("news", "csv"), ("mail", "jsonl"), ("films", "parquet")):
        write(tmp_path / name / f"train.{suffix}", [{"body": row["text"], "topic": row["label"]} for row in labelled()])
    write(tmp_path / "mail" / "test.jsonl", [{"body": "x", "topic": "a"}])
    (
        put(tmp_path / "pictures" / "a.png", b"x"),
        put(tmp_path / ".hidden" / "train.csv", "x"),
        put(tmp_path / "lone.csv", "x"),
    )
    found = Folders(name="folders", text="body", label="topic", test_share=0.25).load(str(tmp_path))
    assert found.names == ["films", "mail", "news"]
    assert found.labels == ["films: a", "films: b", "mail: a", "mail: b", "news: a", "news: b"]
    assert [len(task.test) for task in found.tasks] == [6, 1, 6]
    assert f"not read in {tmp_path}: lone.csv, pictures/" in notes(found)
    assert adds_up(found)["read"] == 73
    one = Folders(name="folders", text="body", label="topic", test_share=0.25, tasks=["news"], label_space="union")
    assert one.load(str(tmp_path)).labels == ["a", "b"]
    printed = clpet("data", "folders", f"data_dir={tmp_path}", "text=body", "label=topic", "model=tiny")
    assert (printed.code, printed.err) == (0, "")
    assert "rows: 73 read = 73 in the tasks" in printed.out
    assert f"warning: not read in {tmp_path}: lone.csv, pictures/" in printed.out
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no folders with data files"):
        Folders(name="folders").load(str(tmp_path / "empty"))


# What is said, and where


def test_train_data_and_eval_say_what_was_skipped_and_the_record_holds_it(tmp_path: Path, clpet) -> None:
    lines = "".join(f"t{i} {'xy'[i % 2]},{i % 2}\n" for i in range(24))
    put(tmp_path / "in" / "train.csv", "text, label\n" + lines + "too,many,cells\n", "utf-16")
    put(tmp_path / "in" / "notes.txt", "x")
    options = ["benchmark=files", "data_dir=in", "model=tiny", "benchmark.skip_bad=true"]
    run = [
        "method=sequential",
        "tracking=off",
        "hardware=cpu",
        "hardware.threads=1",
        "train.epochs=1",
        "benchmark.max_length=16",
    ]
    trained = clpet("train", *options, *run)
    assert trained.code == 0, trained.err
    (out,) = Path("outputs").glob("*/*/s*")
    printed, again = clpet("data", "files", *options[1:]), clpet("eval", str(out))
    log = (out / "train.log").read_text()
    for part in ("not read in in: notes.txt", "decoded by their byte order mark: in/train.csv (UTF-16)", "1 bad rows are dropped",
                 "spaces are removed from the column names"):  # fmt: skip
        assert part in log
        assert part in printed.out
        assert part in again.out + again.err
    for name in ("run.json", "results.json"):
        read = json.loads((out / name).read_text())["data"]["read"]
        assert (read["read"], read["kept"], read["dropped"]) == (25, 24, {"bad": 1})
    assert "rows: 25 read - 1 bad = 24 in the tasks" in printed.out


def test_names_that_are_not_utf8_have_one_name_everywhere(tmp_path: Path) -> None:
    """A file name of other bytes is read, named, hashed and drawn by; whatever the locale made of it."""
    from clpet.config.seeding import derive

    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    put(path, "".join(LINES))
    assert file_name(path) == "caf\\xe9.txt"
    found = domains(tmp_path)
    assert found.names == ["caf\\xe9"]
    assert len(found.fingerprint()) == 16
    odd = os.fsdecode("español".encode()[:5])
    task = Task(odd, [Example("a", odd)], [], [Example("b", odd, {"f": odd})], (odd,))
    assert len(Benchmark("b", [task]).fingerprint()) == 16
    assert derive(0, odd) != derive(0, "espa")


def test_an_ascii_locale_becomes_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python starts once more in its UTF-8 mode, with the same arguments; not twice."""
    import sys

    from clpet.cli import main

    started: list = []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    monkeypatch.setattr(sys, "argv", ["clpet", "list", "methods"])
    monkeypatch.setenv("PYTHONUTF8", "0")
    main.use_utf8()
    assert started == [(sys.executable, [sys.executable, "-m", "clpet", "list", "methods"])]
    assert os.environ["PYTHONUTF8"] == "1"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    main.use_utf8()
    assert len(started) == 1
