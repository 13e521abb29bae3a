"""Prepares the KEY=VALUE words of a command line for Hydra: short keys in full, paths quoted. Imports no torch."""

import os
import re

# Keys that may be written without `benchmark.`.
SHORT_KEYS = {key: f"benchmark.{key}" for key in
              ("tasks", "order", "text", "label", "task", "max_train", "max_validation", "max_test")
              }  # fmt: skip
# Options whose value is a path, or may be one.
PATH_KEYS = ("data_dir", "output_dir", "cache_dir", "model.path", "model.chat_template", "benchmark.folder",
             "benchmark.reference", "benchmark.order_encoder", "method.encoder", "extend")  # fmt: skip
UNQUOTED = re.compile(
    r"[\w./][\w./-]*", re.ASCII
)  # Hydra needs no quotes for such text, unless it looks like a literal
LITERAL = re.compile(r"true|false|[-.]?(nan|inf|[\d._]+(e-?\d+)?)")
HYDRA_FUNCTION = re.compile(r"(choice|glob|sort|shuffle|tag|str)\(.*\)")


def expand_override(word: str) -> str:
    """`benchmark.tasks=[...]` for `tasks=[...]` and so on; the value of a path option becomes a Hydra string."""
    key, equals, value = word.partition("=")
    key = SHORT_KEYS.get(key, key)
    if key.lstrip("+") in PATH_KEYS:
        value = path_value(value)
    return f"{key}{equals}{value}"


def path_value(value: str) -> str:
    """Comma-separated paths, with ~ expanded and quotes where Hydra needs them.

    Quoted values, interpolations and Hydra's functions are returned unchanged.
    """
    inner = value[1:-1]
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return quote(os.path.expanduser(inner)) if inner[:1] == "~" and not set("'\"\\") & set(inner) else value
    if not value or "${" in value or HYDRA_FUNCTION.fullmatch(value):
        return value
    paths = [os.path.expanduser(path) for path in value.split(",")]
    return ",".join(path if needs_no_quotes(path) else quote(path) for path in paths)


def needs_no_quotes(path: str) -> bool:
    """Whether Hydra reads a text as it is written."""
    return bool(UNQUOTED.fullmatch(path)) and not LITERAL.fullmatch(path.lower())


def quote(text: str) -> str:
    """A Hydra string in single quotes: quotes are escaped, and backslashes in front of a quote are doubled."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inner) + "'"
