"""Documents: reading from files and cursors, splits, limits, decontamination."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from clpet.data.decontamination import WINDOW, decontaminate, starts, window_hashes
from clpet.data.document_readers import PIECE, STRETCH, JsonLinesReader, LongText, ParquetReader, TextFiles
from clpet.data.documents import Documents
from clpet.errors import DataError

ROWS = [("a", "one"), ("a", "two"), ("a", "three"), ("b", "four"), (None, "five"), (None, "six"), ("c", "sieben ü")]
TEXTS = ["one\n\ntwo\n\nthree", "four", "five", "six", "sieben ü"]


def parquet(folder: Path, rows: list, group: int = 2) -> ParquetReader:
    path = folder / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"text": text, "doc_id": name} for name, text in rows])
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return ParquetReader(path, "text", "doc_id")


def jsonl(folder: Path, rows: list) -> JsonLinesReader:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "doc_id": name}) + "\n" for name, text in rows))
    return JsonLinesReader(path, "text", "doc_id")


def long_text(folder: Path, text: str) -> LongText:
    (folder / "long.txt").write_text(text)
    return LongText(folder / "long.txt")


def texts(documents: Documents) -> list[str]:
    return [example.text for example in documents]


@pytest.mark.parametrize("write", [parquet, jsonl])
def test_consecutive_rows_of_one_id_are_a_document(tmp_path: Path, write) -> None:
    """Also across row groups; elements can be read in any order."""
    found = Documents.of(write(tmp_path, ROWS))
    assert texts(found) == TEXTS
    assert [found[place].text for place in (4, 0, 2, 0, 3)] == [TEXTS[place] for place in (4, 0, 2, 0, 3)]
    assert (len(found), found.num_pieces, found.has_boundaries) == (5, 7, True)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS) == 35


def test_the_stretches_of_a_text_without_boundaries_add_up_to_it(tmp_path: Path) -> None:
    lines = [f"zeile {i} ü {'x' * (i % 90)}\n" for i in range(4000)] + ["ü" * 100_000]
    found = Documents.of(long_text(tmp_path, "".join(lines)))
    assert "".join(texts(found)) == "".join(lines)
    assert not found.has_boundaries
    assert len(found) > 100
    assert all(text.endswith("\n") for text in texts(found)[:100])
    assert max(len(text.encode()) for text in texts(found)) <= STRETCH + PIECE + 3


def test_files_that_are_documents(tmp_path: Path) -> None:
    for name, data in (("b", b"second\r\nline"), ("a", b"first \xff"), ("c", b"  \n")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    found = Documents.of(TextFiles(sorted(tmp_path.iterdir())))
    assert texts(found) == ["first \ufffd", "second\nline"]  # a file without text is not a document


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "long", "strings"])
def test_reading_resumes_at_a_cursor(tmp_path: Path, kind: str) -> None:
    rows = [(f"d{i // 3}", f"text {i} " * 40) for i in range(60)]
    readers = {"parquet": lambda: parquet(tmp_path, rows, 7), "jsonl": lambda: jsonl(tmp_path, rows),
               "long": lambda: long_text(tmp_path, "\n".join(text for _, text in rows))}  # fmt: skip
    make = lambda: Documents.strings(t for _, t in rows) if kind == "strings" else Documents.of(readers[kind]())  # noqa: E731
    whole = list(make().iterate())
    for stop in (0, 1, len(whole) // 2, len(whole)):
        cursor = whole[stop - 1][1] if stop else 0
        rest = make().iterate(json.loads(json.dumps(cursor)))
        assert [example.text for example, _ in rest] == [example.text for example, _ in whole[stop:]]


def test_resuming_does_not_read_elements_before_the_cursor(tmp_path: Path) -> None:
    """Once the index is built, lines before the cursor may even be overwritten."""
    found = Documents.of(jsonl(tmp_path, [(None, f"text {i}") for i in range(50)]))
    assert len(found) == 50
    path = tmp_path / "rows.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"\0" * (len(data) // 2) + data[len(data) // 2 :])
    assert [example.text for example, _ in found.iterate(40)] == [f"text {i}" for i in range(40, 50)]


def test_a_corpus_is_never_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "long.txt").open("w") as file:
        for i in range(100_000):
            file.write(f"line {i} {'words ' * 20}\n")
    size = (tmp_path / "long.txt").stat().st_size
    tracemalloc.start()
    found = Documents.of(LongText(tmp_path / "long.txt"))
    assert sum(len(example.text) for example in found) == size > 12_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_the_fingerprint_depends_only_on_the_text(tmp_path: Path) -> None:
    one = Documents.of(jsonl(tmp_path, ROWS)).fingerprint()
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    assert Documents.of(JsonLinesReader(tmp_path / "rows.jsonl", "text", "doc_id")).fingerprint() == one
    assert Documents.of(parquet(tmp_path, ROWS)).fingerprint() == one
    assert Documents.of(jsonl(tmp_path, [*ROWS[:-1], ("c", "acht")])).fingerprint() != one
    whole = Documents.of(jsonl(tmp_path, ROWS))
    assert len({one, whole.limited(size=34).fingerprint(), whole[1:].fingerprint()}) == 3


def settled(reader: JsonLinesReader) -> None:
    """Reads all documents; raises DataError for bad rows."""
    len(Documents.of(reader))
    reader.report.drop_bad_rows(skip_bad=False)


def test_invalid_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as parquet"):
        len(Documents.of(ParquetReader(tmp_path / "rows.parquet", "text", "doc_id")))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match="row 2 has no text; did you mean txt"):
        settled(JsonLinesReader(tmp_path / "rows.jsonl", "text", "doc_id"))
    with pytest.raises(DataError, match="has no column body"):
        len(Documents.of(ParquetReader(parquet(tmp_path, ROWS).path, "body", "doc_id")))
    (tmp_path / "rows.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="row 1 has a int in column text, not a text"):
        settled(JsonLinesReader(tmp_path / "rows.jsonl", "text", "doc_id"))


def test_a_limit_takes_documents_by_hash_and_cuts_the_last() -> None:
    """A larger limit selects a superset; the order of the texts and other texts do not matter."""
    words = [f"document {i:03d}" for i in range(100)]
    few, more = (set(texts(Documents.strings(words).limited(n))) for n in (10, 30))
    assert few < more
    assert few != set(words[:10])
    assert set(texts(Documents.strings(words[::-1]).limited(10))) == few
    cut = Documents.strings(words).limited(size=100)
    assert cut.bytes == 100
    assert [len(text) for text in texts(cut)].count(12) == 8


def test_a_limit_never_cuts_inside_a_character() -> None:
    assert texts(Documents.strings(["äöü"]).limited(size=5)) == ["äö"]


def test_limits_count_the_pieces_of_a_document(tmp_path: Path) -> None:
    rows = [("a", f"piece {i}") for i in range(5)]
    found = Documents.of(jsonl(tmp_path, rows)).limited(3)
    assert texts(found) == ["piece 0\n\npiece 1\n\npiece 2"]
    assert found.num_pieces == 3


def test_limits_keep_the_beginning_of_a_text_without_boundaries_and_splits_take_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {i:05d}\n" for i in range(5000))
    whole = Documents.of(long_text(tmp_path, text))
    assert "".join(texts(whole.limited(size=12_345))) == text[:12_345]
    rest, part = whole.split_off(0.2)
    assert "".join(texts(rest)) + "".join(texts(part)) == text
    assert 0.1 * len(text) < part.bytes <= 0.2 * len(text)


def test_a_split_is_by_document_and_equal_documents_stay_together() -> None:
    words = [f"document {i % 150}" for i in range(200)]
    rest, part = Documents.strings(words).split_off(0.1)
    assert sorted(texts(rest) + texts(part)) == sorted(words)
    assert not set(texts(rest)) & set(texts(part))
    assert 0.08 < part.bytes / (part.bytes + rest.bytes) < 0.12
    assert texts(Documents.strings(words[::-1]).split_off(0.1)[1]) == texts(part)[::-1]
    assert [len(part) for part in Documents.strings(["a", "b" * 50]).split_off(0.01)] == [1, 1]
    assert [len(part) for part in Documents.strings(["alone"]).split_off(0.5)] == [1, 0]


def test_the_last_piece_of_a_test_text_ends_with_the_text() -> None:
    assert starts(WINDOW - 1).tolist() == []
    assert starts(WINDOW).tolist() == [0]
    assert starts(2 * WINDOW).tolist() == [0, 200]
    assert starts(2 * WINDOW + 50).tolist() == [0, 200, 250]


def test_equal_windows_have_equal_hashes_at_every_position() -> None:
    rng = np.random.default_rng(0)
    one, two, same = ("".join(map(chr, rng.integers(32, 1000, size))) for size in (333, 777, WINDOW))
    first, second = window_hashes(one + same + two), window_hashes(two + same + one)
    assert len(first) == 333 + 777 + 1
    assert first[333] == second[777] == window_hashes(same)[0]
    assert len(np.intersect1d(first, second)) == (333 - 199) + (777 - 199) + 1  # windows inside a part, no others


def letters(seed: int, count: int) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(97, 123, count)))


def test_a_piece_of_a_test_text_that_occurs_in_train_leaves_a_hole() -> None:
    """It is found at any offset of any train text; two elements remain. 199 characters are not a piece."""
    test, other = letters(1, 1000), letters(2, 300)
    trains = [Documents.strings([letters(3, 5000)]), Documents.strings(["x", "ü" + test[390:610] + "tail"])]
    found, kept = decontaminate([Documents.strings([test]), Documents.strings([other])], trains)
    assert texts(found) == [test[:400], test[600:]]
    assert (found.num_contaminated, kept.num_contaminated, texts(kept)) == (1, 0, [other])
    assert found.bytes == 800
    short = [Documents.strings([test[400:599]])]
    assert decontaminate([Documents.strings([test])], short)[0].num_contaminated == 0


def test_a_piece_is_found_over_stretches_but_not_over_documents(tmp_path: Path) -> None:
    test = letters(4, WINDOW)
    lines = [letters(i, 99) + "\n" for i in range(10, 60)]
    text = "".join(lines)
    stretches = Documents.of(long_text(tmp_path, text))
    assert len(stretches) > 2
    border = len(stretches[0].text)
    across = Documents.strings([text[border - 100 : border + 100]])
    assert decontaminate([across], [stretches])[0].num_contaminated == 1
    halves = Documents.strings([test[:100], test[100:]])
    assert decontaminate([Documents.strings([test])], [halves])[0].num_contaminated == 0


def test_holes_equal_those_of_a_naive_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    train = letters(8, 1_200_000)  # longer than what is looked at together
    parts = [train[at : at + int(rng.integers(150, 700))] if rng.random() < 0.5 else letters(int(at), 450)
             for at in rng.integers(0, len(train) - 1000, 40)]  # fmt: skip
    tests = ["".join(parts[i : i + 4]) for i in range(0, 40, 4)]
    (found,) = decontaminate([Documents.strings(tests)], [Documents.strings([train])])
    assert found.num_contaminated == sum(text[at : at + WINDOW] in train for text in tests for at in starts(len(text)))
    assert found.num_contaminated > 10
