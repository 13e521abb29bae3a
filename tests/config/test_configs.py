"""Every YAML composes and has the same knobs as its dataclass, each with a comment."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from clpet.cli.options import first_comment, options
from clpet.config.build import build, parse_config
from clpet.config.compose import CONFIG_GROUPS, conf_dir
from clpet.config.identity import register_resolvers, run_name, signature
from clpet.config.schema import Config, EvaluationOptions, Training
from tests.config import assert_none

CHOICES = [(group, name) for group in CONFIG_GROUPS for name in options(group)]
KNOBS = ("method", "replay", "peft", "hardware", "tracking")  # groups whose every knob has a comment in every option


def compose_config(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))


# Values of options that have no default.
REQUIRED = {
    "local": ("model.path=.", "model.architecture=encoder"),
    "trainable_tokens": ("peft.token_indices=[1]",),
}
PARTS = [group for group in CONFIG_GROUPS if group != "experiment"]  # experiments: test_experiments.py


def complaint(cfg: DictConfig, config: Config, group: str, name: str) -> str:
    """Describes what is wrong with a shipped YAML; "" if its types, ranges and knobs are those of its dataclass."""
    if group == "debug":
        return ""
    try:
        if not name.endswith("gpu"):
            build(getattr(config, group), group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    module, _, class_name = cfg[group]._target_.rpartition(".")
    cls = getattr(importlib.import_module(module), class_name)
    fields, gathered = {field.name for field in dataclasses.fields(cls)}, getattr(cls, "further_options", None)
    differ = fields ^ (set(cfg[group]) - {"_target_"})
    if gathered:  # other options are checked when it is built
        differ = fields - set(cfg[group]) - {gathered}
    return f"{sorted(differ)}: only in the YAML or only in {class_name}" if differ else ""


def test_every_option_composes_and_builds_from_the_knobs_of_its_dataclass() -> None:
    """The n-th options of all groups are composed together: composing takes a tenth of a second."""
    found = {}
    for number in range(max(len(options(group)) for group in PARTS)):
        chosen = {group: list(options(group))[number] for group in PARTS if number < len(options(group))}
        words = [f"{group}={name}" for group, name in chosen.items()]
        cfg = compose_config(*words, *(word for name in chosen.values() for word in REQUIRED.get(name, ())))
        config = parse_config(cfg)
        found |= {f"{group}={name}": complaint(cfg, config, group, name) for group, name in chosen.items()}
    assert_none(found)
    assert len(found) > 100


def test_every_option_says_what_it_is() -> None:
    """The first comment describes the option and ends with a command that uses it."""
    comments = {f"{group}={name}": first_comment(options(group)[name]) for group, name in CHOICES}
    assert_none({option: text or "no comment" for option, text in comments.items() if "clpet train" not in text})


def test_top_level_knobs_are_those_of_the_dataclasses() -> None:
    cfg = compose_config()
    assert set(cfg) == {field.name for field in dataclasses.fields(Config)}
    assert set(cfg.train) == {field.name for field in dataclasses.fields(Training)}
    assert set(cfg.evaluation) == {field.name for field in dataclasses.fields(EvaluationOptions)}
    assert parse_config(cfg).train == Training()


def knob_lines(path: Path) -> list[str]:
    """Top-level `key: value` lines of a YAML, without the defaults list."""
    return [
        line
        for line in path.read_text().splitlines()
        if re.match(r"^[a-z_]+:", line) and not line.startswith("defaults:")
    ]


def test_every_knob_has_a_comment() -> None:
    paths = [*conf_dir().glob("*/base/*.yaml"), *(options(g)[n] for g, n in CHOICES if g in KNOBS)]
    lines = [(str(path), line) for path in paths for line in knob_lines(path) if not line.startswith("_target_")]
    assert_none({f"{path}: {line}": "no comment" for path, line in lines if "  # " not in line})
    assert len(lines) > 200


def test_train_yaml_is_commented() -> None:
    text = (conf_dir() / "train.yaml").read_text().split("\nhydra:")[0]
    knobs = [line for line in text.splitlines() if re.match(r"^\s*(- )?[a-z_]+: \S", line) and not line.startswith("#")]
    assert_none({line: "no comment" for line in knobs if "  # " not in line})
    assert len(knobs) >= 25


def test_signature_ignores_what_cannot_change_a_result() -> None:
    same = [compose_config(), compose_config("seed=3"), compose_config("hardware=cpu"), compose_config("tracking=off"), compose_config("output_dir=x"),
            compose_config("dry_run=true"), compose_config("fresh=true"), compose_config("train.save_minutes=1")]  # fmt: skip
    assert len({signature(cfg) for cfg in same}) == 1
    other = [
        compose_config("train.lr=2e-3"),
        compose_config("method.top_k=2"),
        compose_config("peft.r=4"),
        compose_config("benchmark.order=reversed"),
    ]
    assert len({signature(cfg) for cfg in [same[0], *other]}) == 5


def test_data_dir_is_the_same_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert signature(compose_config("data_dir=data")) == signature(compose_config(f"data_dir={tmp_path}/data"))


def test_run_directory_is_a_function_of_the_configuration() -> None:
    assert re.fullmatch(r"python_stdlib/dynamic_conpet/s7-[0-9a-f]{8}", run_name(compose_config("seed=7")))
    assert run_name(compose_config("seed=7")) == run_name(compose_config("seed=7", "hardware=cpu"))
