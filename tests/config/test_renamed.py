"""Renamed options: the old name is an error with the new one, wherever it is written."""

from pathlib import Path

import pytest

from clpet.config.renamed import RENAMED_KEYS, translate_keys
from tests.conftest import tiny_args


@pytest.mark.parametrize("old", RENAMED_KEYS)
@pytest.mark.parametrize("plus", ["", "+"])
def test_an_old_name_on_the_command_line(old: str, plus: str, clpet, words: Path) -> None:
    method = ["method=l2p"] if old.startswith("method.") else []
    answer = clpet("train", *tiny_args(words), *method, f"{plus}{old}=1")
    assert (answer.code, answer.err) == (2, f"clpet: {old} was renamed to {RENAMED_KEYS[old]}\n")


def test_an_old_name_in_a_yaml_of_the_user(clpet, words: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    yaml = "# @package _global_\ntrain:\n  keep: 1\n"
    (tmp_path / "mine" / "experiment" / "old.yaml").write_text(yaml)
    answer = clpet("train", "--config-dir", tmp_path / "mine", "experiment=old", *tiny_args(words))
    assert (answer.code, answer.err) == (2, "clpet: train.keep was renamed to train.snapshot_every\n")


def test_recorded_configurations_are_translated() -> None:
    config = {"train": {"keep": 2, "lr": 0.1}, "seed": 0}
    translate_keys(config)
    assert config == {"train": {"snapshot_every": 2, "lr": 0.1}, "seed": 0}
    for other in ({}, {"train": None}, {"train": {"snapshot_every": 3}}, None):
        translate_keys(other)
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in RENAMED_KEYS.items())
