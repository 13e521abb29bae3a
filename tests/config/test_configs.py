"""Every YAML composes, and holds the same knobs as its dataclass, each with a comment."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from clpet.cli.options import first_comment, options
from clpet.config.build import build, typed
from clpet.config.compose import GROUPS, conf_dir
from clpet.config.identity import register_resolvers, run_name, signature
from clpet.config.schema import Config, Evaluation, Training

CHOICES = [(group, name) for group in GROUPS for name in options(group)]
KNOBS = ("method", "replay", "peft", "hardware", "tracking")  # groups whose every knob has a comment in every option


def composed(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))


PARTS = [group for group in GROUPS if group != "experiment"]  # experiments: test_experiments.py


def complaint(group: str, name: str) -> str:
    """What is wrong with a shipped YAML, "" if nothing: its types, ranges and knobs are those of its dataclass."""
    try:
        cfg = composed(f"{group}={name}", *(("model.path=.", "model.architecture=encoder") if name == "local" else ()))
        config = typed(cfg)
        if group == "debug":
            return ""
        if not name.endswith("gpu"):
            build(getattr(config, group), group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    module, _, class_name = cfg[group]._target_.rpartition(".")
    fields = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), class_name))}
    differ = fields ^ (set(cfg[group]) - {"_target_"})
    return f"{sorted(differ)} stand in the YAML or in {class_name} alone" if differ else ""


@pytest.mark.parametrize("group", PARTS)
def test_every_option_composes_and_builds_from_the_knobs_of_its_dataclass(group: str) -> None:
    found = {f"{group}={name}": complaint(group, name) for name in options(group)}
    assert {option: text for option, text in found.items() if text} == {}


def test_every_option_says_what_it_is() -> None:
    """The first comment is a sentence and the command that uses the option."""
    unsaid = [(group, name) for group, name in CHOICES if "clpet train" not in first_comment(options(group)[name])]
    assert unsaid == []


def test_top_level_knobs_are_those_of_the_dataclasses() -> None:
    cfg = composed()
    assert set(cfg) == {field.name for field in dataclasses.fields(Config)}
    assert set(cfg.train) == {field.name for field in dataclasses.fields(Training)}
    assert set(cfg.evaluation) == {field.name for field in dataclasses.fields(Evaluation)}
    assert typed(cfg).train == Training()


def knob_lines(path: Path) -> list[str]:
    """Top-level `key: value` lines of a YAML that are no defaults."""
    return [
        line
        for line in path.read_text().splitlines()
        if re.match(r"^[a-z_]+:", line) and not line.startswith("defaults:")
    ]


def test_every_knob_has_a_comment() -> None:
    paths = [*conf_dir().glob("*/base/*.yaml"), *(options(g)[n] for g, n in CHOICES if g in KNOBS)]
    lines = [(str(path), line) for path in paths for line in knob_lines(path) if not line.startswith("_target_")]
    assert [(path, line) for path, line in lines if "  # " not in line] == []
    assert len(lines) > 200


def test_train_yaml_is_commented() -> None:
    text = (conf_dir() / "train.yaml").read_text().split("\nhydra:")[0]
    knobs = [line for line in text.splitlines() if re.match(r"^\s*(- )?[a-z_]+: \S", line) and not line.startswith("#")]
    assert [line for line in knobs if "  # " not in line] == []
    assert len(knobs) >= 25


def test_signature_ignores_what_cannot_change_a_result() -> None:
    same = [composed(), composed("seed=3"), composed("hardware=cpu"), composed("tracking=off"), composed("output_dir=x"),
            composed("dry_run=true"), composed("fresh=true"), composed("train.save_minutes=1")]  # fmt: skip
    assert len({signature(cfg) for cfg in same}) == 1
    other = [
        composed("train.lr=2e-3"),
        composed("method.top_k=2"),
        composed("peft.r=4"),
        composed("benchmark.order=reversed"),
    ]
    assert len({signature(cfg) for cfg in [same[0], *other]}) == 5


def test_data_dir_is_the_same_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert signature(composed("data_dir=data")) == signature(composed(f"data_dir={tmp_path}/data"))


def test_run_directory_is_a_function_of_the_configuration() -> None:
    assert re.fullmatch(r"python_stdlib/dynamic_conpet/s7-[0-9a-f]{8}", run_name(composed("seed=7")))
    assert run_name(composed("seed=7")) == run_name(composed("seed=7", "hardware=cpu"))
