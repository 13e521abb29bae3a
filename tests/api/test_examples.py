"""The examples in the docstrings of the API run and print what they show."""

import contextlib
import doctest
import importlib.util
import pkgutil
import re
import shutil
import textwrap
from pathlib import Path

import pytest

import clpet
import clpet.api
from tests.conftest import tiny_args

ROOT = Path(__file__).parents[2]
MODULES = [importlib.import_module(f"clpet.api.{module.name}") for module in pkgutil.iter_modules(clpet.api.__path__)]
EXAMPLES = [example for module in MODULES for example in doctest.DocTestFinder().find(module) if example.examples]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: a run that several of them train is trained once."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_prints_what_it_shows(example: doctest.DocTest, outputs: Path) -> None:
    example.globs = {"clpet": clpet}
    printed: list[str] = []
    with contextlib.chdir(outputs):
        doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert printed == []


def test_every_name_of_the_api_has_an_example() -> None:
    names = {example.name.removeprefix("clpet.api.").partition(".")[2].partition(".")[0] for example in EXAMPLES}
    assert names >= clpet.API.keys() - {"ClpetError"}


def test_the_page_of_the_api_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("api_docs", ROOT / "scripts" / "api_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "api.md").read_text() == script.page(), "run `python scripts/api_docs.py`"


def test_the_example_of_the_readme_runs(words: Path, tmp_path: Path) -> None:
    """The lines of the section "From Python", with a tiny model and the words benchmark in my/."""
    block = re.search(r"^## From Python\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert block is not None
    code = textwrap.dedent(block[1])
    small = [f"{word!r}" for word in tiny_args(words) if not word.startswith(("benchmark=", "data_dir="))]
    assert code.count("clpet.train(") == 1
    shutil.copytree(words, "my")
    exec(code.replace("clpet.train(", f"clpet.train({', '.join(small)}, "), {})
