"""Checks of the configuration: one test covers many YAMLs."""

from collections.abc import Mapping


def assert_none(problems: Mapping[str, object]) -> None:
    """Raises AssertionError that lists every YAML with a problem, not just the first; empty values are no problem."""
    lines = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    assert not lines, "\n".join(lines)
