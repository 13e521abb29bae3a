"""The share of the code that a type checker cannot see into stays small."""

import ast
from pathlib import Path

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


def test_states_of_the_lower_packages_are_typed():
    untyped = [
        path.relative_to(PACKAGE).as_posix()
        for package in ("objectives", "replay", "models", "reporting", "runtime", "metrics")
        for path in sorted((PACKAGE / package).rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(function, ast.FunctionDef)
        for annotation in (function.returns, *(argument.annotation for argument in function.args.args))
        if annotation is not None and ast.unparse(annotation).startswith("dict[str, Any]")
    ]
    assert not untyped, f"dict[str, Any] in signatures of {untyped}"
