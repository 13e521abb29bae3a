"""The documentation against the code: its commands compose, its paths and links exist, its table of methods is right."""

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clpet.cli.options import options
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.config.overrides import expand_override
from clpet.config.renamed import RENAMED_KEYS
from clpet.config.schema import Config
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.models.peft_options import FullFineTuning
from scripts.docs_site import ROOT_PAGES, WHOLE_PAGES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PAGE_NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
LETTERS = {"C": "classification", "T": "text_to_text", "L": "language_modeling", "P": "preference"}
OBJECTIVES = {
    name: build(parse_config(compose_config([f"objective={name}"])).objective, "objective") for name in LETTERS.values()
}


def commands(page: Path) -> list[str]:
    """The `clpet train` lines of indented blocks, continued lines joined, without what explains them."""
    joined = re.sub(r" *\\\n\s+", " ", page.read_text())
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    clpet train ")]
    return [re.split(r"\s#|\s{3,}", line)[0] for line in lines]


@cache
def composed(*words: str) -> Config:
    """The configuration of the words; several pages show the same command."""
    return parse_config(compose_config(list(words)))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_command_of_the_documentation_composes(page: Path) -> None:
    for command in commands(page):
        if "--config-dir" in command or page.name == "faq.md":  # whose commands are refused: tests/test_guides.py
            continue
        words = [
            expand_override(word) for word in shlex.split(command)[2:] if "=" in word
        ]  # MODEL and ORDER stand for several
        composed(*(re.sub(r"^([^=]+=)([^\[\]{},'\"]+),.*", r"\1\2", word) for word in words))  # a sweep's first run


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_paths_and_links_of_the_documentation_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    named = re.findall(r"\b(?:clpet|conf|docs|scripts|tests)/[\w/]+\.(?:py|yaml|md|sh|png)\b", text)
    if page.name == "architecture.md":
        named += [f"clpet/{path}" for path in re.findall(r"`([a-z_/]+\.py)`", text)]
    made = [(ROOT / "docs" / name).resolve() for name in (*WHOLE_PAGES, *ROOT_PAGES.values())]  # by the site's hooks
    lost = [path for path in links if not (page.parent / path).exists() and (page.parent / path).resolve() not in made]
    lost += [path for path in named if not (ROOT / path).exists()]
    assert [path for path in lost if Path(path).stem != "mine"] == []  # CONTRIBUTING's example


@pytest.mark.parametrize("page", PAGES[1:], ids=PAGE_NAMES[1:])
def test_links_between_pages_are_named_like_pages(page: Path) -> None:
    """The site has titles, where a checkout has files."""
    assert re.findall(r"\[[^\]]*\.(?:md|ipynb)\]\(", page.read_text()) == []


def test_names_in_the_architecture_page_exist() -> None:
    """`Class`, `function` and `Class.method`: somebody looks for them with grep."""
    code = "\n".join(path.read_text() for path in (ROOT / "clpet").rglob("*.py"))
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = {name.rpartition(".")[2] for name in re.findall(r"`((?:[A-Z]\w+\.)?[a-z][a-z_]{3,}|[A-Z]\w+)`", page)}
    lost = [name for name in names if not re.search(rf"^\s*(?:def|class) {name}\b", code, re.M)]
    assert sorted(set(lost) - set(options("method"))) == []


def test_the_changelog_lists_every_renamed_option() -> None:
    page = (ROOT / "CHANGELOG.md").read_text()
    assert [old for old, new in RENAMED_KEYS.items() if f"| `{old}` | `{new}` |" not in page] == []


def table() -> dict[str, list[str]]:
    """{method: cells} of the README's table of methods."""
    row = r"^\| `(\w+)`: [^|]*\| ([^|]*) \| ([^|]*) \| ([^|]*) \| [^|]* \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    return {name: cells for name, *cells in rows}


def config(name: str) -> Config:
    """The configuration of `method=name`."""
    return composed(f"method={name}")


def goes(method: Method, objective: str, replay: Any, peft: FullFineTuning) -> bool:
    """Whether a method accepts an objective with a memory."""
    try:
        method.check(OBJECTIVES[objective], replay.name, peft)
        replay.check(16, OBJECTIVES[objective].traits)
    except ConfigError:
        return False
    return True


def test_the_table_of_methods_lists_every_option() -> None:
    assert sorted(table()) == sorted(options("method"))


def test_the_picture_of_the_packages_lists_every_line_of_the_import_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    drawn = re.findall(r'<text x="36" [^>]*>(\w+)(?:/|\.py)<', picture)
    assert drawn == [name for name in contract["layers"] if name != "__main__"]


@pytest.mark.parametrize("name", sorted(options("method")))
def test_the_table_of_methods_is_that_of_the_code(name: str) -> None:
    objective, replay, task_id = (re.sub(r"\s*[¹²³⁴]", "", cell) for cell in table()[name])
    method = build(config(name).method, "method")
    reads = [name for name in LETTERS.values() if not method.unmet(OBJECTIVES[name].traits)]
    assert [LETTERS[letter] for letter in objective.split()] == reads

    default, peft = build(config(name).replay, "replay"), build(config(name).peft, "peft")
    none = build(parse_config(compose_config(["replay=none"])).replay, "replay")
    assert goes(method, reads[0], default, peft)
    if not method.uses_replay:
        assert replay == "no"
    else:
        needs = "optional" if goes(method, reads[0], none, peft) else "yes"
        assert replay == f"{needs} ({default.name})"
    optional = "optional" if "task_id_at_test" in vars(method) else "no"
    assert task_id == ("yes" if method.task_id_at_test else optional)
