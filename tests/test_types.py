"""The share of the code that a type checker cannot see into stays small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clpet"
MOST_PER_1000_LINES = 6


def uses_of_any(source: str) -> int:
    """Number of times that a module names `Any`, imports excluded."""
    nodes = ast.walk(ast.parse(source))
    return sum(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in nodes
    )


def test_uses_of_any_are_counted():
    assert uses_of_any("from typing import Any\nimport typing\nx: Any = 1\ndef f(a: dict[str, typing.Any]): ...") == 2


def test_any_is_rare():
    sources = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    counts = {path.relative_to(PACKAGE).as_posix(): uses_of_any(source) for path, source in sources.items()}
    num_lines = sum(len(source.splitlines()) for source in sources.values())
    worst = sorted(counts.items(), key=lambda item: -item[1])[:10]
    share = 1000 * sum(counts.values()) / num_lines
    assert share <= MOST_PER_1000_LINES, f"{share:.1f} uses of Any per 1,000 lines; most are in {worst}"


def untyped_signatures(source: str) -> list[str]:
    """The functions of a module with dict[str, Any], or a name for it, in an annotation."""
    tree = ast.parse(source)
    aliases = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "dict[str, Any]"
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    pattern = re.compile("|".join([r"\b[dD]ict\[str, Any\]", *(rf"\b{alias}\b" for alias in aliases)]))
    return [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for annotation in (
            function.returns,
            *(node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)),
        )
        if annotation is not None and pattern.search(ast.unparse(annotation))
    ]


def test_untyped_signatures_are_found():
    source = "Loose = dict[str, Any]\ndef f(a: int, *, b: list[dict[str, Any]]): ...\ndef g() -> Loose | None: ...\ndef h(a: int): ..."
    assert untyped_signatures(source) == ["f", "g"]


@pytest.mark.parametrize(
    "package", ["methods", "objectives", "training", "replay", "models", "reporting", "runtime", "metrics"]
)
def test_signatures_are_typed(package: str):
    files = sorted((PACKAGE / package).rglob("*.py"))
    untyped = {path.name: names for path in files if (names := untyped_signatures(path.read_text("utf-8")))}
    assert not untyped, f"dict[str, Any] in signatures of {untyped}"


@pytest.mark.slow  # without a cache mypy takes a minute
def test_a_method_names_its_objective(tmp_path: Path):
    """A type checker knows the head of a method of labels, and that another method may have none."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from clpet.methods.base import Method\n"
        "from clpet.objectives.classification import Classification\n"
        "class Labels(Method[Classification]):\n"
        "    def count(self) -> int:\n"
        "        return len(self.objective.head.labels)\n"
        "class Anything(Method):\n"
        "    def count(self) -> int:\n"
        "        return len(self.objective.head.labels)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", PACKAGE.parent / "pyproject.toml", plugin]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    errors = [line for line in result.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, result.stdout
    assert 'mine.py:8: error: "Objective" has no attribute "head"' in errors[0]
