"""Words `KEY=VALUE` of the command line as Hydra reads them: short keys spelt out, paths quoted. Imports no torch."""

import os
import re

# Short spellings of options that are typed often.
SHORT = {key: f"benchmark.{key}" for key in
         ("tasks", "order", "objective", "text", "label", "task", "max_train", "max_validation", "max_test")
         }  # fmt: skip
# Options whose value is a path, or may be one.
PATHS = ("data_dir", "output_dir", "cache_dir", "model.path", "benchmark.folder", "benchmark.reference",
         "benchmark.order_encoder", "method.encoder")  # fmt: skip
PLAIN = re.compile(r"[\w./][\w./-]*", re.ASCII)  # what Hydra reads as the text it is, unless it is a number
FUNCTION = re.compile(r"(choice|glob|sort|shuffle|tag|str)\(.*\)")


def expand_override(word: str) -> str:
    """`tasks=[...]` for `benchmark.tasks=[...]` and the like; the value of a path option becomes a Hydra string."""
    key, equals, value = word.partition("=")
    key = SHORT.get(key, key)
    if key.lstrip("+") in PATHS:
        value = path_value(value)
    return f"{key}{equals}{value}"


def path_value(value: str) -> str:
    """Paths with commas between, quoted for Hydra where it would not read them as they stand; ~ is the home folder.

    What is quoted already, interpolations and Hydra's functions stay as they are.
    """
    inner = value[1:-1]
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return quote(os.path.expanduser(inner)) if inner[:1] == "~" and not set("'\"\\") & set(inner) else value
    if not value or "${" in value or FUNCTION.fullmatch(value):
        return value
    paths = [os.path.expanduser(path) for path in value.split(",")]
    return ",".join(path if _plain(path) else quote(path) for path in paths)


def _plain(path: str) -> bool:
    return bool(PLAIN.fullmatch(path)) and not re.fullmatch(r"true|false|[-.]?(nan|inf|[\d._]+(e-?\d+)?)", path.lower())


def quote(text: str) -> str:
    """A text as a Hydra string: in single quotes; quotes are escaped, and backslashes before a quote doubled."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inner) + "'"
