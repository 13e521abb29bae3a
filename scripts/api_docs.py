"""Writes docs/api.md from the signatures and docstrings of the Python API: `python scripts/api_docs.py`.

A test compares the committed page with this script's output.
"""

import inspect
import re
from pathlib import Path

import clpet
from clpet.api.model import TextModel
from clpet.metrics.transfer_matrix import TransferMatrix

NOT_CALLED = ("clpet.Model", "clpet.Session", "clpet.ClpetError", "TransferMatrix")  # classes that no user constructs
INTERNAL = ("record", "to_json")  # methods of TransferMatrix that write it
PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """# Python API

*Written by `python scripts/api_docs.py` from the docstrings, whose examples are tested.*

Everything is a name of the package: `import clpet`, then `clpet.train(...)`. The calls do what the commands do, with
the same words, defaults, folders and resuming; they never end the process, and leave its working directory, its logging
and its signal handlers as they were. `import clpet` is instant: torch is loaded by the first call that needs it.
[The first notebook](notebooks/first.ipynb) is a first hour with them.
"""
SECTION = re.compile(r"(Args|Returns|Raises|Yields):\n((?:    .*\n?|\n(?=    ))+)")
ENTRY = re.compile(r"^(\S[^:\n]*): ((?:.|\n(?!\S))*)", re.MULTILINE)


def heading(name: str, value: object) -> str:
    """The signature of a function or class as code; the bare name of a property."""
    if name in NOT_CALLED:
        return f"class {name}"
    if isinstance(value, property):
        annotation = inspect.signature(value.fget).return_annotation if value.fget else ""
        return f"{name}: {_plain(annotation.__name__ if inspect.isclass(annotation) else str(annotation))}"
    signature = inspect.signature(value)  # type: ignore[arg-type]
    parameters = [item for key, item in signature.parameters.items() if key != "self"]
    shown = signature.replace(parameters=parameters)
    text = _plain(
        str(shown if not inspect.isclass(value) else shown.replace(return_annotation=inspect.Signature.empty))
    )
    if len(name + text) > 90:  # one parameter per line
        parts = [_plain(str(item)) for item in parameters]
        tail = text.rpartition(")")[2]
        text = "(\n    " + ",\n    ".join(parts) + f",\n){tail}"
    return name + text


def _plain(text: str) -> str:
    """An annotation without quotes and module paths."""
    text = re.sub(r"ForwardRef\('([^']+)'\)|'([^']+)'", lambda match: match[1] or _quoted(match[2]), text)
    return re.sub(r"\b(?!pyarrow)(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def _quoted(text: str) -> str:
    """A forward reference without quotes; a default value keeps them."""
    return text if re.match(r"[A-Z][\w\[\], |]*$|pyarrow|Sequence|dict|str \|", text) else f"'{text}'"


def body(value: object) -> str:
    """A docstring as Markdown: sections of arguments as lists, examples as code."""
    text = SECTION.sub(_section, (inspect.getdoc(value) or "") + "\n")
    text = re.sub(r"\bdocs/(metrics)\.md", r"[Metrics](\1.md)", text)
    return re.sub(r"((?:^>>> .*\n(?:(?!>>>|\n).+\n)*)+)", r"```python\n\1```\n", text, flags=re.MULTILINE).strip()


def _section(match: re.Match[str]) -> str:
    content = inspect.cleandoc(match[2])
    if match[1] == "Returns":
        return f"**Returns** {content}\n"
    entries = [f"- `{name}`: {' '.join(text.split())}" for name, text in ENTRY.findall(content)]
    return f"**{match[1]}**\n\n" + "\n".join(entries) + "\n"


def members(cls: type) -> dict[str, object]:
    """The public methods and properties of a class, inherited ones last, in the order of the source."""
    classes = [base for base in cls.__mro__ if base is not object]
    attributes = {name: value for base in reversed(classes) for name, value in vars(base).items()}
    order = [name for base in classes for name in vars(base)]
    return {
        name: attributes[name]
        for name in dict.fromkeys(order)
        if not name.startswith("_")
        and name not in INTERNAL
        and (inspect.isfunction(attributes[name]) or isinstance(attributes[name], property))
    }


def page() -> str:
    """The whole page. What Session shares with Model is only named there."""
    parts = [INTRODUCTION.strip()]
    named = {name: getattr(clpet, name) for name in clpet.API} | {"TransferMatrix": TransferMatrix}
    for name, value in named.items():
        title = name if name == "TransferMatrix" else f"clpet.{name}"
        parts.append(f"## {title}\n\n```python\n{heading(title, value)}\n```\n\n{body(value)}")
        shared = vars(TextModel).keys() - vars(value).keys() if name == "Session" else set()
        items = members(value) if inspect.isclass(value) else {}
        shared &= items.keys()
        if shared:
            parts.append(f"As in [Model](#clpetmodel): {', '.join(f'`{item}`' for item in items if item in shared)}.")
        for member, item in items.items():
            if member not in shared:
                parts.append(f"### {name}.{member}\n\n```python\n{heading(member, item)}\n```\n\n{body(item)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
