"""Renamed options: the old name is an error with the new one, wherever it is written."""

import copy
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


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_old_name_with_an_entry_of_its_mapping(plus: str, clpet, words: Path) -> None:
    """The names end where the mapping does: Hydra reports only the option itself for an entry that is added."""
    answer = clpet("train", *tiny_args(words), f"{plus}benchmark.keep.multirc=x")
    entry = "" if plus else ".multirc"
    message = f"clpet: benchmark.keep{entry} was renamed to benchmark.cut_last{entry}\n"
    assert (answer.code, answer.err) == (2, message)


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_an_old_name_in_a_yaml_of_the_user(old: str, clpet, words: Path, tmp_path: Path) -> None:
    group, name = old.split(".")
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    yaml = f"# @package _global_\n{group}:\n  {name}: 1\n"
    (tmp_path / "mine" / "experiment" / "old.yaml").write_text(yaml)
    method = ["method=l2p"] if group == "method" else []
    answer = clpet("train", "--config-dir", tmp_path / "mine", "experiment=old", *tiny_args(words), *method)
    assert (answer.code, answer.err) == (2, f"clpet: {old} was renamed to {RENAMED_KEYS[old]}\n")


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_recorded_configurations_are_translated(old: str) -> None:
    group, name = old.split(".")
    config = {group: {name: {"multirc": "x"}, "lr": 0.1}, "seed": 0}
    translate_keys(config)
    if "." not in RENAMED_KEYS[old]:
        assert name not in config[group]
        return
    assert config == {group: {RENAMED_KEYS[old].split(".")[1]: {"multirc": "x"}, "lr": 0.1}, "seed": 0}


def test_a_name_that_is_not_old_stays() -> None:
    """Also in a class outside clpet, which may have an option with that name itself."""
    config = {"method": {"_target_": "mine.Pulling", "pull": 0.5, "keep": 1}, "train": {"begin": 2}}
    before = copy.deepcopy(config)
    translate_keys(config)
    assert config == before
    translate_keys(config, lambda target, group: {"key_loss_weight"})
    assert config["method"] == {"_target_": "mine.Pulling", "key_loss_weight": 0.5, "keep": 1}
    for other in ({}, {"train": None}, {"train": {"snapshot_every": 3}}, None):
        translate_keys(other)
    assert all(old.split(".")[0] == new.split(".")[0] for old, new in RENAMED_KEYS.items() if "." in new)


def test_a_recorded_objective_of_the_benchmark_becomes_an_option_of_its_group() -> None:
    config = {"benchmark": {"_target_": "mine.Tales", "objective": "text_to_text"}}
    translate_keys(config)
    node = {"_target_": "clpet.objectives.text_to_text.TextToText", "name": "text_to_text"}
    assert config == {"benchmark": {"_target_": "mine.Tales"}, "objective": node}
    for present in ({"benchmark": {"_target_": "mine.Tales"}, "objective": node}, {"benchmark": {}}):
        before = copy.deepcopy(present)
        translate_keys(present)
        assert present == before
    oldest = {"benchmark": {"_target_": "clpet.sources.Table"}}
    translate_keys(oldest)
    assert oldest["objective"]["name"] == "classification"
