"""Hooks of mkdocs for `make docs`: the pages, and parts of pages, that are made from the code and the YAMLs.

A line `<!-- made: NAME -->` in a page of docs/ is replaced by the output of a function (`PARTS`); `WHOLE_PAGES` has the
pages that are made in full, and `ROOT_PAGES` those that stand outside docs/.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clpet.cli.options import options
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.config.schema import Config
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.hook_check import STEP_HOOKS
from clpet.models.peft_options import FullFineTuning
from scripts.conclusions import committed, grid, name_cell, with_interval
from scripts.option_pages import GROUPS, cell, code, configuration, entries, group_page, option_table, table

ROOT = Path(__file__).parents[1]
OBJECTIVES = {"C": "classification", "T": "text_to_text", "L": "language_modeling", "P": "preference"}
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINKS = {**ROOT_PAGES, "README.md": "index.md"}
MARK = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)


@cache
def config(*words: str) -> Config:
    """The configuration that the words compose."""
    return parse_config(compose_config(list(words)))


@cache
def peft_option(name: str) -> FullFineTuning:
    """An option of the group peft, with a value where one must be given."""
    words = ["peft.token_indices=[1]"] if name == "trainable_tokens" else []
    option: FullFineTuning = build(config(f"peft={name}", *words).peft, "peft")
    return option


class Support(NamedTuple):
    """What a method declares and what its checks accept."""

    objectives: list[str]  # letters of OBJECTIVES
    pefts: list[str]
    replays: list[str]
    method: Method
    default_replay: str
    default_peft: str


@cache
def support(name: str) -> Support:
    """What `method=name` can be combined with, found by its own checks."""
    method: Method = build(config(f"method={name}").method, "method")
    objectives = {
        letter: build(config(f"objective={key}").objective, "objective") for letter, key in OBJECTIVES.items()
    }
    supported = [letter for letter, objective in objectives.items() if not method.unmet(objective.traits)]
    defaults = config(f"method={name}")
    replay, peft = str(defaults.replay["name"]), str(defaults.peft["name"])

    def accepts(replay: str, peft: str) -> bool:
        memory = build(config(f"replay={replay}").replay, "replay")
        for letter in supported:
            try:
                method.check(objectives[letter], replay, peft_option(peft))
                memory.check(16, objectives[letter].traits)
            except ConfigError:
                continue
            return True
        return False

    pefts = [option for option in options("peft") if accepts(replay, option)]
    replays = [option for option in options("replay") if accepts(option, peft)]
    return Support(supported, pefts, replays, method, replay, peft)


def some_of(names: Sequence[str], everything: Sequence[str]) -> str:
    """A selection in words: the shorter of what is in it and what is not."""
    left_out = [name for name in everything if name not in names]
    if not left_out:
        return "all"
    if len(left_out) < len(names):
        return "all but " + ", ".join(code(name) for name in left_out)
    return ", ".join(code(name) for name in names)


def replay_cell(row: Support) -> str:
    """The memories that a method accepts, its default first."""
    if row.replays == ["none"]:
        return "-"
    others = [name for name in row.replays if name != row.default_replay]
    is_any = set(row.replays) >= set(options("replay")) - {"none"}
    return ", ".join([f"**{code(row.default_replay)}**", *(["or any"] if is_any else map(code, others))])


def task_id(method: Method) -> str:
    """Whether the task of a test example must be given."""
    return "optional" if "task_id_at_test" in vars(method) else "yes" if method.task_id_at_test else "no"


def method_table() -> str:
    """All methods with what they can be combined with."""
    header = ("method", "objective", "peft", "replay", "task at test", "ranks", "shard", "recompute", "merge")
    rows = []
    for name in options("method"):
        row = support(name)
        shards = any(peft_option(peft).traits.shards for peft in row.pefts)
        flags = (shards, row.method.supports_recompute, row.method.mergeable)
        marks = ["yes" if flag else "no" for flag in flags]
        pefts = some_of(row.pefts, list(options("peft")))
        named = (f"[{code(name)}]({name}.md)", " ".join(row.objectives), pefts, replay_cell(row), task_id(row.method))
        rows.append((*named, "yes", *marks))
    return table(header, rows)


def method_part(name: str) -> str:
    """The end of a method's page: what it can be combined with, its options and its figures."""
    row = support(name)
    path = options("method")[name]
    keys = [entry for entry in entries(path, "method") if entry.key.startswith("method.")]
    facts = [
        ("objectives", ", ".join(code(OBJECTIVES[letter]) for letter in row.objectives)),
        ("peft", f"{some_of(row.pefts, list(options('peft')))}; default {code(row.default_peft)}"),
        ("replay", replay_cell(row)),
        ("task given at test", task_id(row.method)),
        ("`clpet export --merge`", "yes" if row.method.mergeable else "no"),
        ("code", f"`{type(row.method).__module__.replace('.', '/')}.py`"),
    ]
    parts = [
        "## Combinations and options",
        table(("", "as declared in the code"), facts),
        option_table(keys) if keys else "The method has no options of its own.",
        "## Measured",
        figures(name),
    ]
    return "\n\n".join(parts)


def figures(name: str) -> str:
    """The rows of the method in the committed tables of results/."""
    rows = [
        [
            item.title,
            name_cell(row),
            with_interval(row),
            *(str(row.mean(key) or "-") for key in ("task_average", "forgetting")),
        ]
        for item in committed()
        for row in item.table.rows
        if f"method={name}" in row.words
    ]
    if not rows:
        return "In no committed table. [Results](../results.md) has what was measured."
    header = ("table", "row (values chosen for it)", "average", "own labels", "forgetting")
    return "Mean [95 % interval] of the final average; the commands are in [Results](../results.md).\n\n" + grid(
        header, rows, words=2
    )


def declarations() -> str:
    """The class attributes of Method with the comments of its source."""
    source = (
        (ROOT / "clpet" / "methods" / "base.py").read_text().split("\nclass Method", 1)[1].split("\n    def ", 1)[0]
    )
    lines = re.findall(r"^    (\w+)(?:: ClassVar\[.*?\])? = (.*?)  # (.*)$", source, re.MULTILINE)
    rows = [(code(name), code(value), cell(comment)) for name, value, comment in lines if name != "name"]
    return table(("attribute", "default", "meaning"), rows)


def hook_table(names: Sequence[str]) -> str:
    """Hooks of Method with the first sentences of their docstrings."""
    summaries = [(name, (inspect.getdoc(getattr(Method, name)) or "").split("\n\n")[0]) for name in names]
    return table(
        ("hook", "what it does unless overridden"), [(code(n), cell(" ".join(s.split()))) for n, s in summaries]
    )


def other_hooks() -> list[str]:
    """The public functions of Method that are not called inside a step, in the order of the source."""
    functions = [
        name for name, value in vars(Method).items() if inspect.isfunction(value) or isinstance(value, classmethod)
    ]
    return [name for name in functions if not name.startswith("_") and name not in STEP_HOOKS]


PARTS: dict[str, Callable[[str], str]] = {
    "method": method_part,
    "methods": lambda _: method_table(),
    "declarations": lambda _: declarations(),
    "step_hooks": lambda _: hook_table(STEP_HOOKS),
    "hooks": lambda _: hook_table(other_hooks()),
}
WHOLE_PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    **{f"configuration/{group}.md": partial(group_page, group) for group in GROUPS},
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of docs/."""
    for name, source in ROOT_PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
        files.append(File.generated(config, source, content=text))
    for name, make in WHOLE_PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for path in sorted((ROOT / "results").glob("*/*/*.*")):  # figures and tables that pages show and link to
        if path.suffix in (".svg", ".csv"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is made, and points links to files outside docs/ to their pages."""
    stem = Path(page.file.src_uri).stem
    text = MARK.sub(lambda match: PARTS[match[1]](stem), markdown).replace("](../results/", "](results/")
    up = "../" * page.file.src_uri.count("/")
    return re.sub(
        r"\]\((?:\.\./)*(\w+\.md)(#[\w-]*)?\)",
        lambda match: f"]({up}{LINKS[match[1]]}{match[2] or ''})" if match[1] in LINKS else match[0],
        text,
    )
