"""Tables with defects: bad rows are reported, repaired or dropped ones are counted and recorded."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clpet.data.benchmark import Benchmark, Example
from clpet.data.read_report import account
from clpet.data.sources import Table
from clpet.data.sources.text_domains import TextDomains
from clpet.data.splits import stratified
from clpet.data.traits import ANSWERS, LABELS, Traits
from clpet.errors import DataError
from clpet.evaluation.data_inspection import inspect_data

LINES = [f"line {i} of a text that is long enough to be a document\n" for i in range(60)]


def put(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    """Writes a file and creates its folders; line ends are written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def labelled(count: int = 24, **more: object) -> list[dict]:
    """Rows with two alternating labels."""
    return [{"text": f"text {i}", "label": "ab"[i % 2], **more} for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    """Writes rows as csv, parquet or jsonl, by the suffix of the path; None is an empty cell."""
    if path.suffix == ".csv":
        cells = [list(rows[0]), *([row.get(key) for key in rows[0]] for row in rows)]
        return put(path, "".join(",".join("" if c is None else f'"{c}"' for c in line) + "\n" for line in cells))
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(folder: Path, traits: Traits = LABELS, **options: object) -> Benchmark:
    """The benchmark of a folder of tables."""
    return Table(name="files", **options).reading_for("made_up", traits).load(str(folder))  # type: ignore[arg-type]


def domains(folder: Path, **options: object) -> Benchmark:
    """The benchmark of a folder of plain-text domains."""
    return TextDomains(name="text_domains", test_share=0.2, **options).load(str(folder))  # type: ignore[arg-type]


def refused(folder: Path, load=table, **options: object) -> str:
    """The one-line error for a folder."""
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
    """The notes on reading that every command prints."""
    return "\n".join(inspect_data(benchmark)["warnings"])


def adds_up(benchmark: Benchmark) -> dict:
    """The record of reading, after a check that its counts add up."""
    record = inspect_data(benchmark)["read"]
    assert record["read"] - sum(record.get("dropped", {}).values()) == record["kept"]
    return record


def text_of(documents) -> str:
    return "".join(example.text for example in documents)


# Empty cells


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_empty_cell_is_an_empty_text_in_a_prompt_and_an_error_elsewhere(suffix: str, tmp_path: Path) -> None:
    """null, a missing key, spaces and NaN are all empty, in every format; never the word None."""
    rows = [{**row, "title": f"title {i}" if i % 2 else None, "dom": "ab"[i % 2]} for i, row in enumerate(labelled())]
    write(tmp_path / "t" / f"train.{suffix}", rows)
    found = table(tmp_path / "t", text="{title} {text}")
    assert sorted(e.text for e in examples(found))[:12] == sorted(f" text {i}" for i in range(0, 24, 2))
    assert "12 empty cells are read as an empty text: column title" in notes(found)
    written = table(tmp_path / "t", traits=ANSWERS, prompt="{title}: {text}")
    assert {e.fields["title"] for e in examples(written)} == {"", *(f"title {i}" for i in range(1, 24, 2))}
    for column, options, words in (
        ("text", {}, "an empty text"),
        ("label", {}, "no label"),
        ("label", {"traits": ANSWERS}, "no label"),
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


def test_all_bad_rows_are_reported_together_or_dropped_and_counted(tmp_path: Path) -> None:
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


def test_csv_rows_with_a_wrong_number_of_cells_and_unpaired_quotes(tmp_path: Path) -> None:
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


def test_counts_of_read_and_dropped_rows_add_up(tmp_path: Path) -> None:
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
    """Ten examples of 70, 20 and 10 % are 7, 2 and 1; the largest remainders get the rest; train is balanced."""
    whole = [Example(str(i), "a" if i < 70 else "b" if i < 90 else "c") for i in range(100)]
    for most, counts in ((10, [7, 2, 1]), (4, [3, 1, 0]), (100, [70, 20, 10]), (15, [11, 3, 1])):
        part = stratified(whole, most)
        assert [sum(e.target == label for e in part) for label in "abc"] == counts
        assert part == stratified(whole, most) == sorted(part, key=lambda e: int(e.text))
    assert len(stratified(whole, 7, labelled=False)) == 7


# Columns


def test_repeated_columns_are_refused_and_padded_names_are_stripped(tmp_path: Path) -> None:
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
def test_a_table_written_by_columns_is_refused_in_one_line(whole: dict, tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        put(tmp_path / str(number) / "train.json", json.dumps(whole, indent=indent))
        message = refused(tmp_path / str(number))
        assert "a list of rows, or one row per line, is expected" in message
        assert len(message) < 300 + len(str(tmp_path))


def test_values_in_messages_are_shortened_and_escaped(tmp_path: Path) -> None:
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
