"""Overrides on the command line: paths reach the configuration as typed, and hints quote texts correctly."""

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from clpet.config.compose import compose_config
from clpet.config.overrides import expand_override, path_value
from tests.cli.test_refusals import one_line

AWKWARD = ["données (2024)", "a=b", "p#1", "it's", 'say "so"', "x;y", "{a: b}", "[1]", "50%", "a&b", "tab\there", "q?*",
           "007", "1e3", "true", "nan", "-1", "a:b", "ends with \\", "back\\'slash", "日本語", "a $HOME", "...", "  two  "]  # fmt: skip


@pytest.mark.parametrize("name", AWKWARD)
def test_a_path_reaches_the_configuration_as_it_was_typed(name: str) -> None:
    """Spaces, parentheses, =, #, quotes, other alphabets, numbers; expanding twice is the same as once."""
    parser = OverridesParser.create()
    for path in (name, f"/data/{name}", f"{name}/inner"):
        word = expand_override(f"data_dir={path}")
        assert parser.parse_override(word).value() == path
        assert parser.parse_override(expand_override(word)).value() == path


def test_all_path_options_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a b")
    for key in ("data_dir", "output_dir", "cache_dir", "model.path", "+model.path", "benchmark.reference"):
        assert expand_override(f"{key}=~/x") == f"{key}='/home/a b/x'"
    assert expand_override("data_dir='~/x'") == "data_dir='/home/a b/x'"
    assert expand_override("train.lr=~/x") == "train.lr=~/x"
    cfg = compose_config([expand_override(f"{key}=~/x=1") for key in ("data_dir", "output_dir", "cache_dir")])
    assert {cfg.data_dir, cfg.output_dir, cfg.cache_dir} == {"/home/a b/x=1"}


def test_values_that_hydra_reads_are_unchanged() -> None:
    for value in ("null", "plain/path-1.2_x", "../up", "${output_dir}/c", "'a b'", '"a b"', "choice(a,b)", ""):
        assert path_value(value) == value
    swept = OverridesParser.create().parse_override(expand_override("data_dir=a (1),b=2,c"))
    assert list(swept.sweep_string_iterator()) == ["'a (1)'", "'b=2'", "c"]
    assert expand_override("task=dom") == "benchmark.task=dom"


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("benchmark.prompt={text}", "{text}"),
        ("benchmark.prompt={title}: {text}", "{title}: {text}"),
        ("benchmark.template=what's {text}?", "what's {text}?"),
        ("text={title} {body}", "{title} {body}"),
    ],
)
def test_a_text_that_hydra_cannot_read_gets_a_quoting_that_works(word: str, right: str, clpet) -> None:
    """The word in the hint is one word for a shell, and Hydra reads it as the intended text."""
    message = one_line(clpet("train", "tracking=off", "benchmark=files", word))
    (typed,) = shlex.split(message.partition(" twice: ")[2])
    cfg = compose_config(["benchmark=files", expand_override(typed)])
    assert cfg.benchmark[typed.partition("=")[0].removeprefix("benchmark.")] == right


def test_entries_of_an_empty_table_get_a_word_that_works(clpet) -> None:
    message = one_line(clpet("train", "tracking=off", "benchmark=files", "benchmark.metrics={a: rouge_l}"))
    (typed,) = shlex.split(message.partition("add them with ")[2])
    assert compose_config(["benchmark=files", expand_override(typed)]).benchmark.metrics == {"a": "rouge_l"}


def test_a_run_in_an_awkward_folder(clpet, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`clpet data` reads a folder below ~ with spaces, =, # and accents in its name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    os.symlink(words, tmp_path / "données (2024) = #1")
    result = clpet("data", "files", "data_dir=~/données (2024) = #1", "task=task", "model=tiny")
    assert result.code == 0, result.err
    assert "river" in result.out
