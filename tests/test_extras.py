"""Packages of extras: the core imports none of them, and an option that needs one is refused with its remedy."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clpet.errors import ClpetError, need_package
from clpet.reporting.run_metrics import t_quantile
from tests.conftest import domain_args, tiny_args

ROOT = Path(__file__).parents[1]
# Packages that only extras install, and the modules that import them, inside of functions.
USERS = {
    "datasets": {"data/tabular_files.py"},
    "rouge_score": {"metrics/text_scores.py"},
    "rapidfuzz": {"metrics/text_scores.py"},
    "absl": {"metrics/text_scores.py"},  # a dependency of rouge-score
    "sentence_transformers": {"models/sentence_encoder.py"},
    "sklearn": {"data/domain_similarity.py", "objectives/key_term_rank.py", "replay/exemplar_selection.py"},
    "vl_convert": {"reporting/report/page.py"},
    "bert_score": {"metrics/text_scores.py"},
    "scipy": {"methods/components/memory_gradient.py"},
    "pandas": set(),
}
SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({missing}))
import clpet
run = clpet.train("method=dynamic_conpet", {words}, quiet=True)
print(clpet.load(run).predict(["apple", "iron"]), clpet.compare("outputs", by="method"))
"""


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The packages that a module imports at its top, and those that it imports anywhere at run time."""
    tree = ast.parse(path.read_text())
    checked = {id(node) for test in ast.walk(tree) if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
               for node in ast.walk(test)}  # fmt: skip
    found: list[set[str]] = []
    for nodes in (tree.body, ast.walk(tree)):
        names = [
            alias.name
            for node in nodes
            if isinstance(node, ast.Import) and id(node) not in checked
            for alias in node.names
        ]
        found.append({name.partition(".")[0] for name in names})
    found[1] |= {str(node.module).partition(".")[0] for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and id(node) not in checked}  # fmt: skip
    found[0] |= {str(node.module).partition(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    return found[0], found[1]


def test_only_these_modules_import_packages_of_extras_and_only_when_they_are_used() -> None:
    users: dict[str, set[str]] = {name: set() for name in USERS}
    for path in (ROOT / "clpet").rglob("*.py"):
        at_top, anywhere = imports(path)
        assert not at_top & USERS.keys(), path
        for name in anywhere & USERS.keys():
            users[name].add(path.relative_to(ROOT / "clpet").as_posix())
    assert users == USERS


def test_every_extra_that_an_error_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [node for path in (ROOT / "clpet").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "need_package"]  # fmt: skip
    named = {ast.literal_eval(call.args[1]) for call in calls if isinstance(call.args[1], ast.Constant)}
    assert {"encoder", "hub", "report", "sklearn"} <= named <= extras.keys()
    with pytest.raises(ClpetError, match=r"^x needs a package that is not installed: pip install 'clpet\[metrics\]'$"):
        need_package("no_such_package", "metrics", "x")


@pytest.mark.slow
def test_options_without_their_package_are_refused_in_one_line(
    words: Path, prose: Path, clpet, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in USERS else find(name, *more))
    answers = ("method=sequential", "objective=text_to_text", "model=tiny_t5", "benchmark.metric=rouge_l")
    for command, what, extra in (
        (["train", "method=emr", *tiny_args(words)], "replay=fixed with replay.selection=kmeans", "sklearn"),
        (["train", "method=slm", *tiny_args(words)], "the sentence encoder minilm", "encoder"),
        (["train", *tiny_args(words), *answers], "benchmark.metric=rouge_l", "metrics"),
        (
            ["train", "method=sequential", *domain_args(prose), "order=similar"],
            "the order of domains by similarity",
            "sklearn",
        ),
        (
            ["train", "method=sequential", *domain_args(prose), "evaluation.rank_prompts=4"],
            "evaluation.rank_prompts",
            "sklearn",
        ),
        (["data", "clinc150"], "the data set clinc/clinc_oos of the hub", "hub"),
        (["report", "."], "an HTML report", "report"),
    ):
        result = clpet(*command)
        message = f"{what} needs a package that is not installed: pip install 'clpet[{extra}]'"
        assert (result.code, result.err.strip()) == (2, f"clpet: {message}"), command


@pytest.mark.slow
def test_a_run_a_prediction_and_a_comparison_need_no_extra(words: Path, tmp_path: Path) -> None:
    args = ", ".join(map(repr, tiny_args(words)))
    script = SCRIPT.format(missing=sorted(USERS.keys() - {"pandas"}), words=args)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_quantiles_of_students_t_are_those_of_tables() -> None:
    """Two-sided 95 % for 1, 2, 10 and 120 degrees of freedom; the first is tan(0.475 pi)."""
    quantiles = [t_quantile(degrees, 0.975) for degrees in (1, 2, 10, 120)]
    assert quantiles == pytest.approx([12.706204736174694, 4.302652729749462, 2.2281388519862744, 1.9799304050824402])
