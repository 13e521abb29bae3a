"""The test texts that a report shows with mistakes: read again by the record, or left out with the reason."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from clpet.reporting.report.page import build_report
from clpet.runs.recorded_texts import RecordedTexts
from clpet.runtime.untrusted_json import read_results
from tests.runs.conftest import edit, put


def texts(run: Path) -> dict[int, str]:
    return dict(RecordedTexts()(run, read_results(run / "results.json")))


def test_texts_belong_to_the_rows_of_the_predictions(finished: Path) -> None:
    """Every text of the words benchmark begins with the word that is its label."""
    table = pyarrow.parquet.read_table(finished / "predictions" / "after-003.parquet").to_pylist()
    by_row = texts(finished)
    assert len(by_row) == len(table) == 24
    assert [by_row[row["example"]].split()[0] for row in table] == [row["label"] for row in table]


def test_a_report_shows_the_texts_of_mistakes(finished: Path) -> None:
    run = read_results(finished / "results.json")
    report = build_report("words", [(finished, run)], ["method"], [], RecordedTexts())
    answers = report.sections[0].answers
    shown = [
        (answers["words"][label], answers["texts"][text])
        for task in answers["runs"][0]["tasks"]
        for _, label, _, _, text in task["mistakes"]
    ]
    assert shown
    assert all(text.split()[0] == label for label, text in shown)
    assert report.sections[0].num_texts == len(shown)
    without = build_report("words", [(finished, run)], ["method"], [])
    assert without.sections[0].num_texts == 0


def test_texts_of_other_data_are_left_out_with_the_reason(
    run: Path, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(words, tmp_path / "data"))
    edit(run, put("config", "data_dir", value=str(data)))
    assert len(texts(run)) == 24
    lines = (data / "test.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "text": "another text"})
    (data / "test.jsonl").write_text("\n".join(lines))
    assert texts(run) == {}
    assert "shown without their texts: the data have changed since" in caplog.text
    shutil.rmtree(data)
    assert texts(run) == {}
    assert f"data_dir={data} is not a folder" in caplog.text


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("config", "benchmark", "_target_"), "os.system", "not part of clpet"),
        (("config", "benchmark", "_target_"), "clpet.replay.base.NoReplay", "does not name a source of data"),
        (("config", "data_dir"), "${oc.env:HOME}", "a recorded configuration must be resolved"),
    ],
)
def test_a_record_from_somebody_else_cannot_name_other_code_or_read_the_environment(
    run: Path, caplog: pytest.LogCaptureFixture, keys: tuple[str, ...], value: str, message: str
) -> None:
    edit(run, put(*keys, value=value))
    assert texts(run) == {}
    assert message in caplog.text
    assert caplog.text.count("\n") == 1


def test_data_of_a_hub_are_not_requested(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(run, put("config", "data_dir", value=None))
    edit(run, put("config", "benchmark", "hub", value="someone/data"))
    assert texts(run) == {}
    assert "their data come from a hub" in caplog.text
