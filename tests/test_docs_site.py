"""The docs site: every page is in its navigation, every method has a page, and what is made from YAMLs is complete."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from clpet.cli.options import options
from clpet.config.compose import CONFIG_GROUPS, compose_config, conf_dir
from clpet.config.table_spec import TableSpec
from clpet.methods.base import Method
from clpet.methods.hook_check import STEP_HOOKS
from clpet.records import Metrics
from clpet.reporting.result_table import ResultTable
from clpet.reporting.table_row import TableRow
from scripts.conclusions import Committed
from scripts.docs_site import MARK, PARTS, ROOT_PAGES, WHOLE_PAGES, declarations, figures, other_hooks, some_of
from scripts.option_pages import cell, configuration, entries, group_page, merged

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def navigation(entry: object) -> list[str]:
    """The pages of a part of `nav` in mkdocs.yml."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in navigation(value)]


def test_the_navigation_lists_every_page_once() -> None:
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted([*written, *ROOT_PAGES.values(), *WHOLE_PAGES])


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    pages = {path.stem: path.read_text() for path in (DOCS / "methods").glob("*.md") if path.stem != "index"}
    assert sorted(pages) == sorted(options("method"))
    for name, text in pages.items():
        assert f"method={name}" in text
        assert [
            word for word in ("Stores:", "Assumes:", "Cost:", "Fails when:", "**Paper.**") if word not in text
        ] == []
        assert MARK.findall(text) == ["method"]


def test_marks_in_pages_are_names_of_parts() -> None:
    marks = {mark for path in DOCS.rglob("*.md") for mark in re.findall(r"<!-- made: (\S*) -->", path.read_text())}
    assert marks <= PARTS.keys()


def test_options_of_a_yaml_have_dotted_keys_defaults_and_whole_comments(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "# What it is. clpet train method=x\n_target_: a.B\nname: x   # name\nrate: 1.0   # weight of a term; null:\n"
        "            # none\nword: 'a # b'   # quoted\nbare:\nstage:   # of keys\n  lr: 1e-3   # its rate\nlast: null   # end\n"
    )
    assert entries(path) == [
        ("rate", "1.0", "weight of a term; null: none"),
        ("word", "'a # b'", "quoted"),
        ("stage", "", "of keys"),
        ("stage.lr", "1e-3", "its rate"),
        ("last", "null", "end"),
    ]


def test_the_reference_has_every_key_of_the_default_run() -> None:
    page = configuration()
    top = yaml.safe_load((conf_dir() / "train.yaml").read_text())
    keys = [key for key in top if key not in ("defaults", "hydra", "train", "evaluation")]
    keys += [f"{section}.{key}" for section in ("train", "evaluation") for key in top[section]]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    groups = [next(iter(group)).partition(" ")[0] for group in top["defaults"] if isinstance(group, dict)]
    assert [name for name in groups if f"| [`{name}`](" not in page] == []


def rows(group: str, name: str) -> dict[str, str]:
    """{key: default} of the table of an option on the page of its group."""
    section = group_page(group).split(f"\n## {name}\n")[1].split("\n## ")[0]
    return {key: default.strip("`") for key, default in re.findall(r"^\| `([^`]+)` \| (\S.*?)? ?\| ", section, re.M)}


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("peft", "lora", {"r": "8", "alpha": "16"}),
        ("peft", "adamss", {"r": "100"}),
        ("peft", "vera", {"r": "256", "vera_dropout": "0.0"}),
        ("benchmark", "files", {"max_length": "128", "test_share": "0.25", "text": "text"}),
        ("benchmark", "text_domains", {"max_length": "1024", "test_share": "0.01"}),
        ("benchmark", "bbn", {"entity": "entity_pos", "max_length": "256"}),
    ],
)
def test_every_option_of_a_group_has_all_its_keys_with_its_own_defaults(
    group: str, name: str, values: dict[str, str]
) -> None:
    """The inherited ones, too: the keys are those of the composed configuration, the defaults its values."""
    shown = rows(group, name)
    assert {key: shown[f"{group}.{key}"] for key in values} == values
    composed = compose_config([f"{group}={name}"])
    for key, entry in merged(options(group)[name], group).items():
        value = OmegaConf.select(composed, key)
        assert OmegaConf.create(f"x: {entry.default}").x == (value["name"] if key in CONFIG_GROUPS else value), key
    assert {f"{group}.{key}" for key in composed[group]} - {f"{group}.name", f"{group}._target_"} <= shown.keys()


def test_a_long_value_is_one_cell_and_other_groups_are_named() -> None:
    shown = rows("benchmark", "superni")
    assert [key for key in shown if key.startswith("benchmark.metrics")] == ["benchmark.metrics"]
    assert shown["benchmark.metrics"].startswith("{task363")
    assert (shown["objective"], rows("benchmark", "m2d2")["train.lr"]) == ("text_to_text", "5e-5")


def test_a_method_shows_its_rows_of_the_committed_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[tuple[int, int], Metrics] = {(0, 0): {"average": 44.0, "task_average": 60.0}}
    rows = [TableRow(name, ["train.lr=1"], [], values, words=[f"method={name}"]) for name in ("ewc", "kif")]
    item = Committed("t", "cpu", TableSpec(), ResultTable("T", "cpu", {}, rows))
    monkeypatch.setattr("scripts.docs_site.committed", lambda: [item])
    assert figures("ewc").splitlines()[2:] == [
        "| table | row (values chosen for it) | average | own labels |",
        "| --- | --- | ---: | ---: |",
        "| t, budget cpu | ewc (train.lr=1) | 44.00 | 60.00 |",
    ]
    assert "In no committed table" in figures("mocl")


def test_cells_have_code_and_no_other_markup() -> None:
    assert cell("a | b_c <d> `e_f`") == r"a \| b\_c &lt;d> `e_f`"
    assert cell("named orders: {name: [tasks]}") == r"named orders: \{name: \[tasks]}"  # not attributes of the cell


@pytest.mark.parametrize(
    ("names", "words"), [("abc", "all"), ("ab", "all but `c`"), ("a", "`a`")], ids=["all", "most", "few"]
)
def test_a_selection_is_written_as_the_shorter_of_it_and_the_rest(names: str, words: str) -> None:
    assert some_of(list(names), list("abc")) == words


def test_the_hooks_of_a_method_are_listed_and_drawn() -> None:
    declared = re.findall(r"^    (\w+)(?:: ClassVar\[.*?\])? = ", inspect.getsource(Method), re.M)
    assert [
        name for name in declared if name not in ("name", "task_id_at_test") and f"| `{name}` |" not in declarations()
    ] == []
    assert {"learn", "after_task", "predict", "named_parameters"} <= {*other_hooks()}
    drawn = re.findall(r'monospace">([^<]+)<', (DOCS / "life_cycle.svg").read_text())
    names = [name for text in drawn for name in text.split(", ")]
    assert [name for name in names if not hasattr(Method, name)] == []
    assert [name for name in STEP_HOOKS if name not in names] == []
