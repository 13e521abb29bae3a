"""`clpet check`: limits on forgetting and on the average of a finished run."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.conftest import run_cli, tiny_args
from tests.runs.conftest import edit, put, refused


@pytest.fixture(scope="module")
def finished(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose scores and predictions the tests replace."""
    out = tmp_path_factory.mktemp("runs")
    assert run_cli("train", "method=sequential", *tiny_args(words), "train.epochs=1", f"output_dir={out}") == 0
    (folder,) = out.glob("*/*/s*")
    return folder


@pytest.fixture
def run(finished: Path) -> Path:
    """The run with a final row of 50, 80, 90, and 100, 81, 90 right after learning."""
    rows = [[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [70.0, 81.0, 0.0], [50.0, 80.0, 90.0]]
    edit(finished, lambda value: value.update(scores=rows, task_scores=[[99.0] * 3] * 4), "results.json")
    for row in (1, 3):
        answers(finished, row, right=8 if row == 1 else 4)
    return finished


def answers(run: Path, row: int, right: int) -> None:
    """Sets the scores of the first task in a file of predictions: `right` of 8 examples are right."""
    file = run / "predictions" / f"after-{row:03d}.parquet"
    table = pyarrow.parquet.read_table(file)
    counted, scores = 0, []
    for task in table["task"].to_pylist():
        scores.append(float(counted < right) if task == "fruit" else 1.0)
        counted += task == "fruit"
    assert counted == 8
    column = table.column_names.index("score")
    pyarrow.parquet.write_table(table.set_column(column, "score", pyarrow.array(scores)), file)


def test_a_task_that_fell_too_far_gets_a_line_with_its_interval(run: Path, clpet) -> None:
    answer = clpet("check", str(run))
    assert answer.code == 1
    # 4 of 8 paired examples fell from right to wrong: the bootstrap of a share of 0.5 over 8 examples.
    assert answer.out == (
        "fruit fell by 50.00 points, more than 2: 100.00 after task 1, 50.00 after task 3 "
        "(95 % interval of the drop 12.50 to 87.50)\n"
    )
    assert clpet("check", str(run), "--max-drop", "0.5").out.count("\n") == 2  # metal fell by 1


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--max-drop", "50"), 0, "passed: sequential on "),
        (("--max-drop", "49.9"), 1, "fruit fell by 50.00 points, more than 49.9"),
        (("--view", "own"), 0, "largest drop 0.00 points (fruit), at most 2"),
        (("--min-average", "73.3"), 0, "average 73.33, at least 73.3"),
        (("--min-average", "80"), 1, "average 73.33 is below 80 (95 % interval "),
        (("--min-average", "80", "--max-drop", "2"), 1, "fruit fell"),
    ],
)
def test_limits(run: Path, clpet, flags: tuple[str, ...], code: int, text: str) -> None:
    answer = clpet("check", str(run), *flags)
    assert (answer.code, text in answer.out) == (code, True), answer.out + answer.err


def test_drops_can_be_measured_from_another_run(run: Path, tmp_path: Path, clpet) -> None:
    import shutil

    other = Path(shutil.copytree(run, tmp_path / "other"))
    edit(other, put("scores", 3, value=[53.0, 80.0, 70.0]), "results.json")
    answer = clpet("check", str(run), "--against", str(other))
    assert answer.code == 1
    assert answer.out.startswith(f"fruit is worse by 3.00 points, more than 2: 53.00 in {other}, 50.00 after task 3")
    assert answer.out.count("\n") == 1
    edit(other, put("test_sets", value={"fruit": "another"}), "results.json")
    assert "not measured on the same test examples" in clpet("check", str(run), "--against", str(other)).err


def test_a_perplexity_may_rise_by_a_share(run: Path, tmp_path: Path, clpet) -> None:
    import shutil

    other = Path(shutil.copytree(run, tmp_path / "other"))

    def perplexities(value: dict[str, Any]) -> None:
        value |= {"direction": "lower", "scores": [[9.0] * 3, [4.0, 9, 9], [4.0, 5, 9], [4.4, 5, 6]]}

    edit(other, perplexities, "results.json")
    assert clpet("check", str(other), "--max-drop", "10").code == 0
    answer = clpet("check", str(other), "--max-drop", "9")
    assert answer.out == "fruit rose by 10.00 %, more than 9: 4.00 after task 1, 4.40 after task 3\n"
    assert refused(clpet("check", str(other), "--min-average", "5"))


def test_what_was_not_measured_is_said_or_refused(run: Path, clpet) -> None:
    edit(run, put("scores", 1, 0, value=None), "results.json")
    answer = clpet("check", str(run))
    assert answer.code == 0
    assert answer.out.endswith("note: not compared, since a score is missing: fruit\n")
    edit(run, put("scores", value=[[None] * 3] * 3 + [[50.0, 80.0, 90.0]]), "results.json")
    edit(run, put("scores", 3, 2, value=None), "results.json")
    assert refused(clpet("check", str(run)))
    assert refused(clpet("check", str(run), "--min-average", "50"))


@pytest.mark.parametrize("flags", [("--max-drop", "-1"), ("--max-drop", "nan"), ("--min-average", "101")])
def test_limits_outside_their_range_are_refused(run: Path, clpet, flags: tuple[str, ...]) -> None:
    assert refused(clpet("check", str(run), *flags))
    assert refused(clpet("check", "nowhere"))
