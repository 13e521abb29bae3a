"""`clpet.compare` has the figures of `clpet runs --compare --format csv`."""

import csv
import io
from pathlib import Path

import pytest

import clpet
from tests.conftest import run_cli, tiny_args


@pytest.fixture(scope="module")
def outputs(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two methods with two seeds."""
    folder = tmp_path_factory.mktemp("outputs")
    for method in ("sequential", "replay"):
        for seed in (0, 1):
            options = {"output_dir": str(folder), "seed": seed, "max_train": 8}
            clpet.train(f"method={method}", *tiny_args(words), "train.epochs=1", **options, quiet=True)
    return folder


@pytest.mark.parametrize("view", ["all", "own"])
def test_rows_are_the_figures_of_the_command_line(view: str, outputs: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    words = ("--compare", "method", "--metrics", "average,bwt", "--format", "csv", "--view", view)
    assert run_cli("runs", outputs, *words) == 0
    expected = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    table = clpet.compare(outputs, by="method", metrics=["average", "bwt"], view=view).to_pylist()
    assert [row["figure"] for row in table] == ["average", "bwt"] * 2
    assert {row["method"] for row in table} == {"sequential", "replay"}
    for row, line in zip(table, expected, strict=True):
        assert list(row) == list(line)
        assert (round(row["mean"], 6), round(row["std"], 6), row["n"]) == (float(line["mean"]), float(line["std"]), 2)
        assert {key: value for key, value in row.items() if key not in ("mean", "std", "n")} == {
            key: value for key, value in line.items() if key not in ("mean", "std", "n")
        }


def test_one_seed_has_no_deviation(outputs: Path) -> None:
    table = clpet.compare(outputs, by=["method", "seed"], metrics="average").to_pandas()
    assert len(table) == 4
    assert table["std"].isna().all()
    assert table.set_index(["method", "seed"])["mean"].notna().all()


def test_wrong_arguments_are_refused(outputs: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ({"folder": tmp_path / "none"}, "is not a folder"),
        ({"folder": tmp_path}, "no finished runs"),
        ({"by": "methd"}, "no run has the option methd"),
        ({"metrics": ["averag"]}, "unknown metric averag; did you mean average"),
        ({"view": "both"}, "view must be"),
        ({"benchmark": "clinc150"}, "no finished runs"),
    ]:
        with pytest.raises(clpet.ClpetError, match=message):
            clpet.compare(**{"folder": outputs, **arguments})
