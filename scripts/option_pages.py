"""The pages of the docs site about options: all keys with their defaults, from the comments of the YAMLs in conf/."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from clpet.cli.options import first_comment, options
from clpet.config.compose import CONFIG_GROUPS, conf_dir

CODE_AND_COMMENT = re.compile(r"""((?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)#)*?)(?:(?:^|(?<=\s))#\s?(.*))?$""")
OPEN_ROWS = 12  # a longer table is folded
GROUPS = tuple(group for group in CONFIG_GROUPS if group != "method")  # a method has its own page
OVERLAYS = ("experiment", "debug")  # their keys are those of the other groups


class Entry(NamedTuple):
    """An option of a YAML: its key with dots, its default value and its comment."""

    key: str
    default: str
    comment: str


class Source:
    """A YAML with its comments."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        self.lines = text.splitlines()
        self.root = yaml.compose(text, yaml.SafeLoader)
        self.is_global = bool(self.lines) and self.lines[0].startswith("# @package _global_")

    def comment(self, key: yaml.Node) -> str:
        """The comment beside a key, with the lines that continue it."""
        words: list[str] = []
        for line in self.lines[key.start_mark.line :]:
            match = CODE_AND_COMMENT.fullmatch(line)
            code, comment = (match[1].strip(), match[2] or "") if match else (line, "")
            if words and (code or not comment or not line.startswith(" ")):
                break
            words.append(comment)
        return " ".join(words)

    def items(self, node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
        """The keys of a mapping with their values."""
        return node.value if isinstance(node, yaml.MappingNode) else []

    def has_options(self, node: yaml.Node) -> bool:
        """Whether a value is a mapping of options, each with a comment, and not itself the value of one option."""
        items = self.items(node)
        return bool(items) and all(self.comment(key) or self.has_options(value) for key, value in items)

    def read(self, node: yaml.Node | None, prefix: str) -> Iterator[Entry]:
        """The options below a node, those without a comment included."""
        for key, value in self.items(node):
            name = f"{prefix}{key.value}"
            if self.has_options(value):
                if not (self.is_global and "." not in name):  # a section or group itself
                    yield Entry(name, "", self.comment(key))
                yield from self.read(value, f"{name}.")
            elif key.value not in ("defaults", "_target_", "name"):
                yield Entry(name, value_text(value), self.comment(key))


def value_text(node: yaml.Node) -> str:
    """A value in one line: a number or text as it is written, a list or mapping with brackets."""
    if isinstance(node, yaml.ScalarNode):
        return " ".join(node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer].split())
    value = yaml.SafeLoader("").construct_object(node, deep=True)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True).strip()


def merged(path: Path, package: str = "") -> dict[str, Entry]:
    """{key: entry} of a YAML and of those in its defaults list; a later value replaces an earlier one.

    A value without a comment keeps the comment of the value that it replaces.

    Args:
        package: the key under which the contents of the file are placed, such as `benchmark`.
    """
    source = Source(path)
    package = "" if source.is_global else package
    defaults = next((value for key, value in source.items(source.root) if key.value == "defaults"), None)
    found: dict[str, Entry] = {}
    own = list(source.read(source.root, f"{package}." if package else ""))
    parts = (
        [list(part) for part in inherited(path, package, defaults)] if isinstance(defaults, yaml.SequenceNode) else []
    )
    for entry in (entry for part in [*parts, own] for entry in part):
        known = found.get(entry.key)
        found[entry.key] = entry._replace(comment=entry.comment or known.comment) if known else entry
    return found


def inherited(path: Path, package: str, defaults: yaml.SequenceNode) -> Iterator[Sequence[Entry]]:
    """The entries of every line of a defaults list except `_self_`."""
    for item in defaults.value:
        if isinstance(item, yaml.ScalarNode) and item.value != "_self_":
            name, _, target = item.value.partition("@")
            yield list(merged(path.parent / f"{name}.yaml", package if target in ("", "_here_") else target).values())
        elif isinstance(item, yaml.MappingNode):
            (key, value), *_ = item.value
            group = re.fullmatch(r"override /(\w+)(?:@.*)?", key.value)
            if group:
                yield [Entry(group[1], str(value.value), f"chooses another default of the group `{group[1]}`")]


def entries(path: Path, package: str = "") -> list[Entry]:
    """The options of a YAML that have a comment, those from its defaults list included."""
    return [entry for entry in merged(path, package).values() if entry.comment]


def cell(text: str) -> str:
    """A text as a cell of a table, without meaning to Markdown except for code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_\[{])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


def code(text: str) -> str:
    """A text as code in a cell; a long one is cut."""
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return f"`{shown}`".replace("|", r"\|") if shown else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def option_table(options_of: Sequence[Entry]) -> str:
    """Keys, defaults and meanings."""
    return table(
        ("key", "default", "meaning"), [(code(key), code(default), cell(text)) for key, default, text in options_of]
    )


def configuration() -> str:
    """The options of conf/train.yaml, and the groups."""
    top = entries(conf_dir() / "train.yaml")
    sections = list(dict.fromkeys(key.partition(".")[0] for key, _, _ in top if "." in key))
    parts = [
        "# Configuration",
        "Made from the comments in `conf/`. Every key can be set on the command line and in Python; `clpet train --cfg "
        "job` prints the whole configuration of a run, `clpet list GROUP NAME` the YAML of an option.",
        "## Groups",
        "A group has options to choose from, each with its own keys: `clpet train method=ewc method.strength=1e3`. A "
        "group's page has all keys and defaults of every option.",
        group_table(),
        "## Top level",
        option_table([entry for entry in top if "." not in entry.key]),
    ]
    for section in sections:
        parts += [f"## {section}", option_table([entry for entry in top if entry.key.startswith(f"{section}.")])]
    return "\n\n".join(parts) + "\n"


def group_table() -> str:
    """The groups with their pages, defaults and the comments of the defaults list."""
    source = Source(conf_dir() / "train.yaml")
    lists = [value for key, value in source.items(source.root) if key.value == "defaults"]
    rows = []
    for item in (item for found in lists for item in found.value if isinstance(item, yaml.MappingNode)):
        (key, value), *_ = item.value
        page = "methods/index.md" if key.value == "method" else f"configuration/{key.value}.md"
        rows.append((f"[{code(key.value)}]({page})", code(value.value), cell(source.comment(key))))
    return table(("group", "default", "what it chooses"), rows)


def group_page(group: str) -> str:
    """The options of a config group, and for every option all its keys."""
    listed = options(group)
    names = [(f"[{code(name)}](#{name})" if group not in OVERLAYS else code(name)) for name in listed]
    rows = [(name, cell(first_comment(path))) for name, path in zip(names, listed.values(), strict=True)]
    parts = [f"# {group}", table(("option", "what it is"), rows)]
    if group not in OVERLAYS:
        for name, path in listed.items():
            parts += [f"## {name}", cell(first_comment(path)), folded(entries(path, group))]
    return "\n\n".join(parts) + "\n"


def folded(found: Sequence[Entry]) -> str:
    """The table of an option's keys; a long one is folded."""
    if not found:
        return "It has no keys."
    shown = option_table(found)
    if len(found) <= OPEN_ROWS:
        return shown
    return f'<details markdown="1"><summary>{len(found)} keys</summary>\n\n{shown}\n\n</details>'
