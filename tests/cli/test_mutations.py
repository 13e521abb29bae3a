"""Random configurations and data files: each gives a run or a one-line error, and later runs still work."""

import contextlib
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from clpet.data.tabular_files import read_local
from clpet.errors import DataError
from tests.conftest import tiny_args, write_words
from tests.runtime.test_untrusted_json import mutated

pytestmark = pytest.mark.slow
MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)  # a failing example is reported as it is: to shrink it takes hours
VALUES = ["null", "-1", "0", "1", "2", "3", "0.5", "-0.5", "1e-9", "nan", "inf", "-inf", "true", "false", "''", "x", "[]",
          "[a,b]", "[1]", "{}", "{a: 1}", "../../x", "/dev/null", "'${oc.env:HOME}'", "'${x}'", "'{text}'", "a=b", "[", "é",
          "'\\x00'", "9" * 30, "first", "all"]  # fmt: skip
# Options that are not varied: locations, hardware, and those that would only make a run long.
EXCLUDED = (
    "output_dir",
    "cache_dir",
    "data_dir",
    "hardware.",
    "hydra.",
    "tracking.",
    "fresh",
    "dry_run",
    "benchmark.max_length",
)
GROUPS = {
    "method": ["dynamic_conpet", "kif", "slm", "crl", "replay", "ewc", "joint", "l2p", "osf", "dapt", "nobody"],
    "replay": ["none", "dynamic", "fixed", "share", "reservoir", "all", "rate"],
    "peft": ["lora", "none", "prompt", "prefix", "ia3"],
}


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all options except EXCLUDED ones."""
    names = []
    for name, value in node.items_ex(resolve=False):
        key = f"{prefix}{name}"
        names += keys(value, f"{key}.") if isinstance(value, DictConfig) else [key]
    return [key for key in names if not key.startswith(EXCLUDED)]


@pytest.fixture(scope="module")
def option_keys(words: Path) -> list[str]:
    from clpet.config.compose import compose_config

    return keys(compose_config(["method=kif", *tiny_args(words)]))


def check_run_or_one_line(result: Any) -> None:
    """Checks for a successful run, or one line and its exit code."""
    assert result.code in (0, 1, 2), result.err
    assert "internal error" not in result.err
    assert "Traceback" not in result.err + result.out
    if result.code:
        assert result.err.splitlines()[-1].startswith("clpet: ")


def check_later_run(clpet, args: list[str]) -> None:
    """Checks that valid input still gives a run after all the invalid ones."""
    again = clpet(*args)
    assert again.code == 0, again.err


def test_any_configuration_is_a_run_or_one_line(option_keys: list[str], words: Path, clpet, tmp_path: Path) -> None:
    codes = []
    group = st.sampled_from([(name, option) for name, options in GROUPS.items() for option in options])
    knob = st.tuples(st.sampled_from(option_keys), st.sampled_from(VALUES))
    args = ["train", *tiny_args(words, "train.epochs=1"), "output_dir=out"]

    @MANY
    @given(st.lists(group, max_size=2), st.lists(knob, min_size=1, max_size=2))
    def survives(groups: list, mutations: list) -> None:
        words = [f"{key}={value}" for key, value in dict([*groups, *mutations]).items()]
        result = clpet(*args, *words)
        codes.append(result.code)
        check_run_or_one_line(result)

    survives()
    assert 2 in codes
    check_later_run(clpet, [*args, "method=kif"])


@pytest.mark.parametrize("how", ["rows", "bytes"])
def test_any_data_are_a_run_or_one_line(how: str, clpet, tmp_path: Path) -> None:
    """Changed rows or bytes in the training or test file."""
    folder = write_words(tmp_path / "words", copies=2)
    good = {split: (folder / f"{split}.jsonl").read_bytes() for split in ("train", "test")}
    args = ["train", "method=replay", *tiny_args(folder, "train.epochs=1"), "output_dir=out"]
    split = st.sampled_from(sorted(good))
    codes = []

    def tried(name: str, content: bytes) -> None:
        for other, text in good.items():
            (folder / f"{other}.jsonl").write_bytes(text)
        (folder / f"{name}.jsonl").write_bytes(content)
        shutil.rmtree(tmp_path / "out" / ".cache", ignore_errors=True)
        result = clpet(*args, "fresh=true")
        codes.append(result.code)
        check_run_or_one_line(result)

    @settings(MANY, max_examples=50)
    @given(split, st.data())
    def rows(name: str, data: st.DataObject) -> None:
        lines = [json.loads(line) for line in good[name].splitlines()]
        changed = data.draw(mutated(copy.deepcopy(lines)))
        changed = changed if isinstance(changed, list) else [changed]
        tried(name, "".join(json.dumps(line) + "\n" for line in changed).encode())

    @settings(MANY, max_examples=50)
    @given(split, st.data())
    def anything(name: str, data: st.DataObject) -> None:
        text = good[name]
        at, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 200))
        tried(name, text[:at] + data.draw(st.binary(max_size=20)) + text[at + gone :])

    (rows if how == "rows" else anything)()
    assert 2 in codes
    for name, text in good.items():
        (folder / f"{name}.jsonl").write_bytes(text)
    check_later_run(clpet, [*args, "fresh=true"])


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json", "jsonl"])
def test_any_file_is_read_or_refused(suffix: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    folder = write_words(tmp_path, copies=2)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "other" / f"train.{suffix}"
    path.parent.mkdir()
    if suffix == "csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else (folder / "train.jsonl").read_text())
    intact = path.read_bytes()

    @settings(MANY, max_examples=500)
    @given(st.integers(0, len(intact)), st.integers(0, 200), st.binary(max_size=20))
    def survives(at: int, gone: int, new: bytes) -> None:
        path.write_bytes(intact[:at] + new + intact[at + gone :])
        with contextlib.suppress(DataError):
            read_local(path.parent, {"train": "train"})

    survives()
