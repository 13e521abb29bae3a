"""Finds options that were set although they have no effect: a run says so before it begins."""

import dataclasses
from enum import Enum

from clpet.methods.base import Method


def unused_options(method: Method) -> list[str]:
    """A line for every option that the method calls ineffective and that differs from its default.

    The method must be set up. An option that its memory does not have is left out.
    """
    lines = []
    for key, reason in method.ineffective().items():
        group, _, option = key.partition(".")
        owner = method if group == "method" else method.replay
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        value = getattr(owner, option, None)
        if option in defaults and value != defaults[option]:
            lines.append(f"{key}={value.value if isinstance(value, Enum) else value} has no effect: {reason}")
    return lines
