"""The guides of the docs site, read as a user reads them: their files are written, their commands and code are run."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import tiny_args

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps(page: str) -> list[tuple[str, str]]:
    """(kind, text) of what a page shows, in order: `command` for a line that begins with clpet, else a block's kind."""
    found = [(match.start(), match[1], match[2]) for match in FENCE.finditer(page)]
    outside = FENCE.sub(lambda match: "\n" * len(match[0]), page)
    found += [(match.start(), "command", match[1]) for match in re.finditer(r"^    clpet (.*)$", outside, re.MULTILINE)]
    return [(kind, text) for _, kind, text in sorted(found)]


def plain(text: str) -> str:
    """A text without its numbers and the widths of its columns: processors round differently."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "#", text).split())


def words_of(command: str, run: str = "") -> list[str]:
    """The words that a shell gives to `clpet`; RUN stands for a run directory."""
    return [re.sub(r"\bRUN\b", run, word) for word in shlex.split(command, comments=True)]


@pytest.mark.slow
def test_the_tutorial_does_what_it_shows(clpet, tmp_path: Path) -> None:
    """Every command succeeds and prints the lines shown below it, numbers apart; the Python code runs.

    A tiny model with random weights takes the place of MiniLM, for speed.
    """
    output, run = "", ""
    for kind, text in steps((DOCS / "tutorial.md").read_text()):
        if kind == "csv":
            with (tmp_path / "tickets.csv").open("a") as table:
                table.write(text)
        elif kind == "command":
            words = words_of(text, run)
            answer = clpet(*words, *(["model=tiny"] if "benchmark=files" in words else []))
            assert answer.code == 0, f"{text}: {answer.err}"
            output = plain(answer.out)
            run = run or next(map(str, tmp_path.glob("outputs/files/replay/s0-*")), "")
        elif kind == "text":
            assert [line for line in text.splitlines() if plain(line) not in output] == []
        else:
            exec(text, {"clpet": importlib.import_module("clpet"), "run": run})
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert "AutoModel" in (tmp_path / "exported" / "README.md").read_text()
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 49
    (extended,) = (path for path in tmp_path.glob("outputs/files/replay/s0-*") if str(path) != run)
    assert json.loads((extended / "results.json").read_text())["extended_from"]["tasks"] == [
        "orders",
        "payments",
        "accounts",
    ]


@pytest.mark.slow
def test_the_example_of_the_page_of_conversations_learns_its_answers(clpet, tmp_path: Path) -> None:
    section = (DOCS / "chat.md").read_text().split("\n## An example")[1].split("\n## ")[0]
    output, run = "", ""
    for kind, text in steps(section):
        if kind == "command":
            answer = clpet(*words_of(text, run))
            assert answer.code == 0, answer.err
            output = " ".join(answer.out.split())
            run = next(map(str, tmp_path.glob("outputs/chat/replay/s0-*")))
        elif kind == "text":
            assert " ".join(text.split()) in output
        else:
            exec(text, {})
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 96
    assert all(row["prediction"] == row["answer"] for row in rows)


@pytest.fixture
def own_method(tmp_path: Path) -> Path:
    """The two files of the guide to a new method."""
    python, yaml = (text for kind, text in steps((DOCS / "new_method.md").read_text()) if kind in ("python", "yaml"))
    folder = tmp_path / "my_code"
    (folder / "method").mkdir(parents=True)
    (folder / "mine.py").write_text(python)
    (folder / "method" / "mine.yaml").write_text(yaml)
    return folder


@pytest.mark.slow
def test_the_method_of_the_guide_learns_and_is_sequential_without_its_penalty(own_method, words, clpet) -> None:
    averages = {}
    for name, *options in (("mine", "method.strength=0"), ("mine", "method.strength=10"), ("sequential",)):
        flags = ["--config-dir", str(own_method)] if name == "mine" else []
        answer = clpet("train", *flags, f"method={name}", *options, *tiny_args(words))
        assert answer.code == 0, answer.err
        averages[name, *options] = re.search(r"average +(\S+)\n(?:.*\n)*?bwt +(\S+)", answer.out).groups()
    assert averages["mine", "method.strength=0"] == averages["sequential",]
    assert averages["mine", "method.strength=10"] != averages["sequential",]


@pytest.mark.slow
def test_the_errors_of_the_page_of_questions_are_printed_as_shown(clpet) -> None:
    """A command is refused with the line below it."""
    shown = 0
    error = ""
    for kind, text in steps((DOCS / "faq.md").read_text()):
        if kind == "command":
            answer = clpet(*words_of(text))
            assert answer.code == 2, text
            error = answer.err
        elif error:
            assert text.strip() in error
            error, shown = "", shown + 1
    assert shown >= 10
