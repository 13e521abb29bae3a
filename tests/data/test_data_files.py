"""Encodings, line ends, and the choice of files in a folder, for tables and for plain text."""

import gzip
import json
import os
from pathlib import Path

import pytest

from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.data_files import file_name
from clpet.data.document_readers import JsonLinesReader, LongText, TextFiles, open_readers
from clpet.data.documents import Documents
from clpet.data.sources import Folders
from clpet.errors import DataError
from tests.data.test_tabular_files import (
    LINES,
    adds_up,
    domains,
    examples,
    labelled,
    notes,
    put,
    refused,
    table,
    text_of,
    write,
)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be-bom", "utf-32", "utf-8-sig"])
def test_encodings_with_a_byte_order_mark_are_decoded(encoding: str, tmp_path: Path) -> None:
    """Tables, several text files and a single one; every encoding other than UTF-8 is reported."""

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


def test_a_stretch_does_not_end_inside_a_crlf(tmp_path: Path) -> None:
    """A line of more than STRETCH bytes is cut; the cut must not separate CR and LF."""
    from clpet.data.document_readers import LONGEST_LINE, PIECE

    for size in range(PIECE + LONGEST_LINE - 2, PIECE + LONGEST_LINE + 2):
        path = put(tmp_path / f"{size}.txt", b"x" * size + b"\r\nend")
        assert text_of(Documents.of(LongText(path))) == "x" * size + "\nend"


# Files


def test_hidden_files_are_ignored_and_others_are_reported(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "a" / f"{i}.txt", "".join(LINES[i::4]))
    put(tmp_path / "b.TXT", "".join(LINES))
    for name in ("._b.txt", ".ipynb_checkpoints/b-checkpoint.txt", "a/._0.txt", "a/.git/x.txt", ".DS_Store"):
        put(tmp_path / name, "hidden")
    for name in ("d.json", "f.md", "a/notes.docx", "sub/only.pdf", "a/README.md", "LICENSE"):
        put(tmp_path / name, "unread")
    put(tmp_path / "e.txt.xz", gzip.compress(b"text"))
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "link.txt")
    found = domains(tmp_path)
    assert found.names == ["a", "b"]
    assert f"not read in {tmp_path}: a/notes.docx, d.json, e.txt.xz, f.md, link.txt and 1 more" in notes(found)
    assert adds_up(found)["unread"] == {
        str(tmp_path): {"count": 6, "names": ["a/notes.docx", "d.json", "e.txt.xz", "f.md", "link.txt", "sub/"]}
    }


def test_unread_files_next_to_tables_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "train.CSV".lower(), labelled())
    (tmp_path / "train.csv").rename(tmp_path / "train.CSV")
    for name in ("dev.csv", "notes.txt", "more/x.csv", ".train.csv"):
        put(tmp_path / name, "x")
    assert f"not read in {tmp_path}: dev.csv, more/, notes.txt" in notes(table(tmp_path))


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        write(tmp_path / "t" / f"train.{suffix}", labelled())
    assert "has train.csv and train.parquet for one split" in refused(tmp_path / "t")
    put(tmp_path / "d" / "a.txt", "x"), put(tmp_path / "d" / "a" / "b.txt", "x")
    assert "a/ and a.txt would both be the domain a" in refused(tmp_path / "d", domains)
    put(tmp_path / "s" / "a" / "train.txt", "x"), put(tmp_path / "s" / "a" / "train.jsonl", '{"text": "x"}')
    assert "a/train.jsonl and a/train.txt have the same name" in refused(tmp_path / "s", domains)


@pytest.mark.parametrize("name", ["test", "validation", "dev", "Test", "test-00000-of-00001", "valid_1"])
def test_a_single_test_file_is_not_used_as_train(name: str, tmp_path: Path) -> None:
    write(tmp_path / "t" / f"{name}.jsonl", labelled())
    assert f"has only {name}.jsonl: a {'test' if 'est' in name else 'validation'} file is not used as train" in refused(
        tmp_path / "t"
    )
    put(tmp_path / "d" / "a" / f"{name}.txt", "".join(LINES))
    assert f"{name}.txt has no train file next to it" in refused(tmp_path / "d", domains)


def test_rows_without_text_are_reported_together_or_dropped(tmp_path: Path) -> None:
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


def test_counts_of_read_and_dropped_documents_add_up(tmp_path: Path) -> None:
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


def test_train_data_and_eval_print_and_record_what_was_skipped(tmp_path: Path, clpet) -> None:
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


def test_file_names_that_are_not_utf8_are_the_same_in_every_locale(tmp_path: Path) -> None:
    """Such a file is read, reported, hashed and used as a seed key by one name, whatever the locale."""
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
    """Python restarts once in UTF-8 mode, with the same arguments."""
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
