"""The words of the project: no private identifiers in the package, no unusual phrases in texts that users read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "clpet").rglob("*.py"))
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml"), *MODULES]

# Vague words that say nothing about a value: a variable has the name of what it holds.
VAGUE = "found place places own part known held kept wanted asked told said there here again made whole alone"
# Names of version 0.1.0 that were replaced by the terms of the field. Left out of this list because they are the right
# words for something else: begin, between, written, due, keep, leave, main, memory, old, first, fill, selection, rates, terms,
# summary, table, trial, measured, dropped, pieces, key, reserved, recall, A, B, a, b, Table (a benchmark source),
# Evaluation (the result of one), leading, past, without, probe, most, important.
OLD = """
    Keeper Fit Best passed over Interrupt CODE Ranks Joined joined apart heard on_host PATIENCE
    guarded parted normalised listing Recorded Reopened MADE Plan split_limit equal_compute Held spare remember
    RateReplay stand_in LogitStore Place _usable _where Increments increments weighted mixed
    extended Units spread deviation mix Tally even together judge trace Choices first_adapter one_model
    repeatable validates pefts borders front own_softmax picture composed typed knob knobs
    isolate pull warmup_share
"""
OLD_MODULES = """
    halfway interrupt mistakes dry reading reopen store mixing rates logits terms increments overlaps retrieval contrast
    selector embeddings readers corpus ranks console state results pretraining sari_metric commands launcher
"""
# {module below clpet/: names that must stay there}, for the reason given.
ALLOWED = {
    "cli/runs.py": {"here", "picture"},  # attributes of argparse: the flags --here and --picture
    "records.py": {"kept", "own", "borders", "whole"},  # keys in files of a run
    "methods/components/importance.py": {"kept"},  # a key in checkpoints
    "metrics/transfer_matrix.py": {"whole"},  # the published name of a metric
    "replay/base.py": {"spare", "passed"},  # keys in checkpoints
    "reporting/tables.py": {"whole"},
    "runs/run_dir.py": {"whole"},
    "training/fit_record.py": {"over"},  # a key in checkpoints
    "runs/tracking.py": {"whole"},
}

PHRASES = [
    r"anew", r"beside", r"shared out", r"in the midst of", r"(?:goes|go|went|gone) on", r"passed over",
    r"what there is", r"there (?:is|are) no such", r"what it is that", r"gone on with", r"knobs?",
    r"(?<!there )(?:is|are) no(?! longer| more)",  # "is not a"
    r"(?:is|are|was|were|be|been|being) (?:told|asked)",
    r"(?:config|configuration|data|file|record|YAML|option|row|column|benchmark|table)s? says?",
    r"lies? (?:in|below|elsewhere)",
]  # fmt: skip
AVOIDED = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every variable, argument, attribute, keyword, function, class and import alias."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(asname=str(name)):
                yield name, node.lineno
            case ast.keyword(arg=str(name)):
                yield name, node.value.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "clpet")))
def test_identifiers_are_terms_of_the_field(path: Path) -> None:
    banned = {*OLD.split(), *VAGUE.split()} - ALLOWED.get(path.relative_to(ROOT / "clpet").as_posix(), set())
    names = identifiers(ast.parse(path.read_text()))
    assert [f"{path.name}:{line}: {name}" for name, line in names if name in banned] == []


def test_modules_are_named_after_terms_of_the_field() -> None:
    assert [str(path) for path in MODULES if path.stem in OLD_MODULES.split()] == []


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a reader sees: all of a page or YAML; strings, docstrings and comments of a module."""
    content = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(content.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"\s+", " ", node.value)
    yield from ((number, line.partition("#")[2]) for number, line in enumerate(content.splitlines(), 1))


def test_texts_have_no_unusual_phrases() -> None:
    matches = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 40]!r}"
        for path in TEXTS
        for line, text in texts(path)
        for match in AVOIDED.finditer(text)
    ]
    assert "\n".join(matches) == ""
