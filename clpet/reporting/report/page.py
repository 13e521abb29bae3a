"""Renders a report as one HTML file: the template, its style and scripts, and the chart library, all inside it."""

import base64
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from clpet import __version__
from clpet.errors import ConfigError, need_package
from clpet.escape import printable
from clpet.records import Json, Results
from clpet.reporting.answers import ReadTexts
from clpet.reporting.comparison import Comparison
from clpet.reporting.report.sections import SectionPart, environment, section_part
from clpet.reporting.run_groups import Runs, options_of, value_of
from clpet.runtime.atomic_io import write_text

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Report:
    """The contents of the page."""

    title: str
    summary: str
    sections: list[SectionPart]
    environment: dict[str, list[str]]
    unfinished: list[str]
    created: str
    version: str = __version__


def select(runs: Runs, conditions: list[str]) -> Runs:
    """The runs that fulfil every condition KEY=VALUE[,VALUE...]. Raises ConfigError for a key that no run has."""
    for condition in conditions:
        key, equals, values = condition.partition("=")
        pairs = [(pair, value_of(options_of(*pair), key)) for pair in runs]
        if not equals or all(value is None for _, value in pairs):
            raise ConfigError(f"--where {condition}: give KEY=VALUE with an option of the runs, such as method=kif,ewc")
        runs = [pair for pair, value in pairs if value in values.split(",")]
        if not runs:
            available = sorted({str(value) for _, value in pairs})
            raise ConfigError(f"--where {condition}: no run has this value; {key} is one of {', '.join(available)}")
    return runs


def build_report(
    title: str, runs: Runs, keys: list[str], unfinished: list[str], texts: ReadTexts | None = None
) -> Report:
    """Collects the contents of a report about finished runs, compared by the options `keys`."""
    comparison = Comparison(keys)
    sections = [section for section in comparison.sections(runs) if section.rows]
    parts = [section_part(comparison, section, sections, texts or _no_texts) for section in sections]
    benchmarks = ", ".join(dict.fromkeys(section.benchmark for section in sections))
    num_rows, plural = sum(len(section.rows) for section in sections), "s" * (len(runs) != 1)
    summary = f"{len(runs)} run{plural} in {num_rows} setting{'s' * (num_rows != 1)} on {benchmarks}"
    created = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return Report(title, summary, parts, environment(runs), unfinished, created)


def _no_texts(path: Path, run: Results) -> Mapping[int, str]:
    return {}


def write_report(report: Report, file: Path) -> None:
    """Writes the page. Nothing in it is loaded from elsewhere, which its content security policy enforces."""
    write_text(file, render(report))


def render(report: Report) -> str:
    """The page as HTML. Every text from data is escaped; scripts run only if their hash is in the policy."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_visible,
    )  # fmt: skip
    # One script: answers.js defines functions that report.js calls at its end.
    page_script = "\n".join((ASSETS / name).read_text("utf-8") for name in ("answers.js", "report.js"))
    scripts = [chart_library(), page_script]
    return environment.get_template("report.html").render(
        report=report,
        style=Markup((ASSETS / "report.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        json=script_json,
    )


@functools.cache  # takes two seconds
def chart_library() -> str:
    """Vega-Lite with all that it needs, as one script. Raises ConfigError where the package is not installed."""
    need_package("vl_convert", "report", "an HTML report")
    import vl_convert  # 90 MB of compiled code: only for this command

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _policy(scripts: list[str]) -> str:
    """The content security policy: no request at all, and no other scripts. Vega compiles its own expressions."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


def _visible(value: object) -> object:
    """A text for the page without control characters and marks that reverse the direction of writing."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def script_json(value: Json) -> Markup:
    """JSON inside a script element: no character of it can end the element or start markup."""
    text = json.dumps(_printable_tree(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _printable_tree(value: Json) -> Json:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable_tree(item) for key, item in value.items()}
    return [_printable_tree(item) for item in value] if isinstance(value, list | tuple) else value
