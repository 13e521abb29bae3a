"""Files of a run directory with arbitrary content are shown or rejected with a one-line error, nothing else."""

import contextlib
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clpet.cli import main
from clpet.errors import ClpetError, DataError
from clpet.runs.load_run import read_record
from clpet.runs.run_record import check_config
from clpet.runtime.untrusted_json import read_json
from tests.conftest import domain_args, run_cli, tiny_args

SLOW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../x", "/etc/passwd", "\x1b[2J", "\ud800", "${oc.env:HOME}", "os.system", "higher", "lower"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)  # fmt: skip


def node_paths(node: Any, path: tuple = ()) -> list[tuple]:
    """Returns the paths to all nodes of a tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(child for key, value in items for child in node_paths(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A tree with one to three of its nodes replaced, removed or duplicated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(node_paths(value)[1:] or [()]))
        if not path:
            return draw(VALUES)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "duplicate"]))
        if action == "remove":
            del parent[path[-1]]
        elif action == "duplicate" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = draw(VALUES)
    return value


@pytest.fixture(scope="module")
def runs(words: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run measured by accuracy, and one measured by perplexity."""
    folders = {}
    for name, args in {"words": tiny_args(words), "prose": domain_args(prose)}.items():
        out = tmp_path_factory.mktemp(name)
        assert run_cli("train", "method=sequential", *args, f"output_dir={out}") == 0
        (folders[name],) = out.glob("*/*/s*")
    return folders


def show_or_one_error(path: Path, capsys: pytest.CaptureFixture, *flags: str) -> None:
    """`clpet show` prints the run or a one-line error."""
    code = main.main_with_errors(["show", str(path), *flags])
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), err
    assert "internal error" not in err
    assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize("kind", ["words", pytest.param("prose", marks=pytest.mark.slow)])
def test_show_survives_any_results(kind: str, runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(runs[kind], tmp_path / "a" / "b" / "run"))
    valid = json.loads((run / "results.json").read_text())

    @SLOW
    @given(mutated(valid), st.sampled_from([(), ("--metrics",)]))
    def survives(value: Any, flags: tuple[str, ...]) -> None:
        (run / "results.json").write_text(json.dumps(value))
        show_or_one_error(run, capsys, *flags)

    survives()


def test_show_survives_any_bytes(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(runs["words"], tmp_path / "run"))
    valid = (run / "results.json").read_bytes()

    @SLOW
    @given(st.integers(0, len(valid)), st.integers(0, 200), st.binary(max_size=20))
    def survives(start: int, removed: int, new: bytes) -> None:
        (run / "results.json").write_bytes(valid[:start] + new + valid[start + removed :])
        show_or_one_error(run, capsys)

    survives()


def test_a_recorded_config_is_built_or_rejected(runs: dict[str, Path], tmp_path: Path) -> None:
    """Whatever run.json contains, only classes of clpet are imported and only a ClpetError is raised."""
    run = Path(shutil.copytree(runs["words"], tmp_path / "run"))
    valid = json.loads((run / "run.json").read_text())

    @SLOW
    @given(mutated(valid))
    def survives(value: Any) -> None:
        (run / "run.json").write_text(json.dumps(value))
        with contextlib.suppress(ClpetError):
            assert type(read_record(run).method).__module__.startswith("clpet.")

    survives()


def test_damaged_runs_are_skipped(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(runs["words"].parents[2], tmp_path / "out"))
    (damaged,) = out.glob("*/*/s*")
    shutil.copytree(damaged, damaged.with_name("s1-00000000"))
    (damaged / "results.json").write_text('{"method": 3}')
    assert main.main_with_errors(["runs", str(out), "--compare", "method"]) == 0
    assert capsys.readouterr().out.count("sequential") == 1


@pytest.mark.parametrize(("text", "message"), [("[1]", "does not contain a JSON object"), ("NaN", "not a finite number"), ('{"a": 1e999}', "not a finite number"), ('{"a": -Infinity}', "not a finite number"),
                                  ('{"a": 99999999999999999999}', "too large"), ('{"a":' * 40 + "1" + "}" * 40, "too deeply")])  # fmt: skip
def test_invalid_json_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "x.json")


def test_checking_a_valid_config_does_not_change_it(runs: dict[str, Path]) -> None:
    for run in runs.values():
        config = json.loads((run / "run.json").read_text())["config"]
        before = copy.deepcopy(config)
        check_config(config, False, "")
        assert config == before
