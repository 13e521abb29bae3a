"""scripts/prepare_data.py: the parquet files give exactly the same benchmark as the published files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.data.test_entities import CLASSES, source
from tests.published import write_published

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture):
    """Runs the script in this process; returns exit code, lines of stdout and stderr."""
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: object) -> tuple[int, list[str], str]:
        code = module.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return call


def rows(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("name", CLASSES)
def test_prepared_and_published_files_are_the_same_benchmark(name: str, prepare, tmp_path: Path) -> None:
    raw = write_published(name, tmp_path / "raw")
    code, lines, _ = prepare(name, raw, tmp_path / "out")
    assert code == 0
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines[:3]] == [
        f"{split}.parquet" for split in ("validation", "test", "train")
    ]
    assert source(name).load(str(tmp_path / "out")).fingerprint() == source(name).load(str(raw)).fingerprint()
    assert [path.name for path in tmp_path.rglob("*.*.*")] == []  # nothing half-written is left


def test_prepared_files_can_be_inspected_with_clpet_data(clpet, tmp_path: Path) -> None:
    """The script as a command, then `clpet data`."""
    raw = write_published("tacred", tmp_path / "raw")
    done = subprocess.run([sys.executable, SCRIPT, "tacred", raw, tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith(f"clpet data tacred data_dir={tmp_path / 'out'}")
    assert len(rows(tmp_path / "out" / "tacred" / "train.parquet")) == 6 * 41  # no_relation is left out
    inspection = clpet("data", "tacred", f"data_dir={tmp_path / 'out'}", "model=tiny")
    assert inspection.code == 0, inspection.err
    assert [line.split()[:5] for line in inspection.out.splitlines()[1:3]] == [
        ["task01", "30", "10", "15", "5"],
        ["task02", "24", "8", "12", "4"],
    ]


def test_clinc150_within_its_scope(prepare, tmp_path: Path) -> None:
    published = {key: [[f"{key} {i}", "ab"[i % 2]] for i in range(4)] for key in ("train", "val", "test")}
    (tmp_path / "data_full.json").write_text(json.dumps({**published, "oos_train": [["x", "oos"]]}))
    assert prepare("clinc150", tmp_path, tmp_path / "out")[0] == 0
    assert rows(tmp_path / "out" / "clinc150" / "validation.parquet")[1] == {"text": "val 1", "label": "b"}
    assert len(rows(tmp_path / "out" / "clinc150" / "train.parquet")) == 4


def test_superni_tasks_become_folders(prepare, tmp_path: Path) -> None:
    """200 instances, 10 of which repeat an input: 19 for test, a tenth of the other 171 for validation."""
    items = [{"id": f"task1-{i}", "input": f"in {i % 190}", "output": [f"out {i}", "or"]} for i in range(200)]
    (tmp_path / "task1_x.json").write_text(json.dumps({"Definition": ["Answer."], "Instances": items}))
    assert prepare("superni", tmp_path, tmp_path / "out")[0] == 0
    folder = tmp_path / "out" / "superni" / "task1_x"
    splits = {split: rows(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    assert {split: len(items) for split, items in splits.items()} == {"train": 154, "validation": 17, "test": 19}
    inputs = [row["input"] for items in splits.values() for row in items]
    assert len(set(inputs)) == len(inputs) == 190
    first = next(row for items in splits.values() for row in items if row["input"] == "in 0")
    assert first == {"id": "task1-0", "definition": "Answer.", "input": "in 0", "output": "out 0", "references": ["out 0", "or"]}  # fmt: skip


def test_superni_takes_at_most_a_thousand_and_a_hundred(prepare, tmp_path: Path) -> None:
    items = [{"id": str(i), "input": f"in {i}", "output": ["x"]} for i in range(3000)]
    (tmp_path / "task3.json").write_text(json.dumps({"Definition": "Answer.", "Instances": items[:5]}))
    (tmp_path / "task2.json").write_text(json.dumps({"Definition": "Answer.", "Instances": items}))
    prepare("superni", tmp_path, tmp_path / "out")
    sizes = [
        len(rows(tmp_path / "out" / "superni" / "task2" / f"{s}.parquet")) for s in ("train", "validation", "test")
    ]
    assert sizes == [900, 100, 100]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tacrd", "."], "unknown data set tacrd; did you mean tacred?"),
        (["tacred", "nowhere"], "nowhere is not a folder"),
        (["tacred", "RAW"], "lacks train.json, dev.json, test.json: put"),
        (["clinc150", "RAW"], "data_full.json does not exist"),
        (["superni", "RAW"], "contains no task*.json"),
        (["superni", "BROKEN"], "task1.json is not a task of Super-NaturalInstructions"),
        (["clinc150", "BROKEN"], "data_full.json is not JSON"),
        (["superni", "NOTHING"], "task1 has no train examples"),
    ],
)
def test_invalid_input_prints_one_line(words: list[str], expected: str, prepare, tmp_path: Path) -> None:
    (tmp_path / "RAW").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "task1.json").write_text('{"Instances": []}')
    (tmp_path / "NOTHING").mkdir()
    (tmp_path / "NOTHING" / "task1.json").write_text('{"Definition": ["x"], "Instances": []}')
    (tmp_path / "BROKEN" / "data_full.json").write_text("[")
    raw = tmp_path / words[1] if words[1].isupper() else words[1]
    code, lines, err = prepare(words[0], raw, tmp_path / "out")
    assert code == 2
    assert lines == []
    assert err.startswith("prepare_data: ")
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(prepare, tmp_path: Path) -> None:
    raw = write_published("bbn", tmp_path / "raw")
    (tmp_path / "file").write_text("in the way")
    code, _, err = prepare("bbn", raw, tmp_path / "file")
    assert code == 1
    assert "cannot be written" in err


def test_help_shows_examples() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.count("python scripts/prepare_data.py") == 7
