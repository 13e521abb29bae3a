"""The claims of papers in results/claims.yaml, compared with the committed tables.

A claim has tests such as `replay > ewc`, `joint < replay` or `ewc ~ sequential 2` (equal within two points), of two rows
of a table. p-values of paired t-tests are corrected after Holm over all tests of the file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from clpet.reporting.run_costs import COSTS
from clpet.reporting.table_statistics import Paired
from scripts.conclusions import LEVEL, RESULTS, Committed, corrected, shown_p, widest

FILE = RESULTS / "claims.yaml"
TEST = re.compile(r"(\w+) ([<>~]) (\w+)(?: (\d+(?:\.\d+)?))?")
HOLDS, REFUTED, OPEN, UNMEASURED = "holds", "does not hold", "undecided at this size", "not measured here"
METRICS = {
    "average": "final average", "task_average": "average among own labels", "forgetting": "forgetting", "bwt": "bwt",
    "seconds": "seconds of training", "forward_examples": "examples passed forwards", "flops": "FLOPs",
    "stored_bytes": "stored bytes", "replay_bytes": "bytes of old examples", "trained_parameters": "trained parameters",
}  # fmt: skip


@dataclass(frozen=True)
class Test:
    """One comparison of a claim, with its difference of the left and the right row where both were measured."""

    text: str
    sign: str
    margin: float
    pair: Paired | None


@dataclass(frozen=True)
class Claim:
    """A claim with its source, and tests on a table (TABLE, or TABLE/BUDGET).

    `verdict` and `note` are written by hand; a verdict counts only as long as none of the tests has been measured.
    """

    paper: str
    claim: str
    source: str
    table: str = ""
    metric: str = "average"
    tests: list[str] = field(default_factory=list)
    verdict: str = ""
    note: str = ""


def read_claims(file: Path = FILE) -> list[Claim]:
    """The claims of the file. Raises ValueError for a test or verdict that cannot be read."""
    claims = [Claim(**entry) for entry in yaml.safe_load(file.read_text())]
    for claim in claims:
        if claim.metric not in METRICS or claim.verdict not in ("", HOLDS, REFUTED, OPEN):
            raise ValueError(f"{file}: {claim.claim}: metric {claim.metric}, verdict {claim.verdict}")
        if bad := [test for test in claim.tests if not TEST.fullmatch(test)]:
            raise ValueError(f"{file}: {claim.claim}: {bad[0]} is not a test; write one as in replay > ewc")
    return claims


def measured_test(text: str, metric: str, item: Committed | None) -> Test:
    """A test with its difference on a table; without one if a row is missing."""
    left, sign, right, margin = TEST.fullmatch(text).groups()  # type: ignore[union-attr]
    rows = [item.row(name) if item else None for name in (left, right)]
    pair = None
    if rows[0] is not None and rows[1] is not None:
        pair = rows[0].minus(rows[1], metric)
    return Test(text, sign, float(margin or 0), pair)


def outcome(test: Test, p: float | None) -> str:
    """Whether a test holds at 5 % after Holm; `~` holds if the interval of the difference is within the margin."""
    pair = test.pair
    if pair is None or pair.low is None or pair.high is None:
        return OPEN
    if test.sign == "~":
        inside = -test.margin <= pair.low and pair.high <= test.margin
        outside = pair.low > test.margin or pair.high < -test.margin
        return HOLDS if inside else REFUTED if outside else OPEN
    if p is None or p >= LEVEL:
        return OPEN
    return HOLDS if (pair.mean > 0) == (test.sign == ">") else REFUTED


def verdict(outcomes: Sequence[str]) -> str:
    """Of a claim: it holds if all its tests do, and does not hold if one of them does not."""
    if not outcomes or (OPEN in outcomes and REFUTED not in outcomes):
        return OPEN
    return REFUTED if REFUTED in outcomes else HOLDS


def section(tables: Sequence[Committed], claims: Sequence[Claim]) -> str:
    """All claims by paper, each with its verdict, figures and tests."""
    by_name = {f"{item.name}/{item.budget}": item for item in tables} | {item.name: item for item in widest(tables)}
    tests = [[measured_test(text, claim.metric, by_name.get(claim.table)) for text in claim.tests] for claim in claims]
    flat = [test for group in tests for test in group]
    values = iter(corrected([test.pair if test.sign != "~" else None for test in flat]))
    papers: dict[str, list[str]] = {}
    verdicts = []
    for claim, group in zip(claims, tests, strict=True):
        found = [(test, p := next(values), outcome(test, p)) for test in group]
        unmeasured = all(test.pair is None for test in group)
        verdicts.append(claim.verdict or UNMEASURED if unmeasured else verdict([result for _, _, result in found]))
        result = verdicts[-1] + (", without a test" if unmeasured and verdicts[-1] in (HOLDS, REFUTED) else "")
        papers.setdefault(claim.paper, []).append(_entry(claim, result, found, by_name.get(claim.table)))
    count = ", ".join(f"{verdicts.count(name)} {name}" for name in (HOLDS, REFUTED, OPEN, UNMEASURED))
    parts = [f"Of {len(claims)} claims: {count.replace('holds', 'hold', 1).replace('does not', 'do not')}."]
    for paper, entries in papers.items():
        parts += [f"### {paper}", "\n".join(entries)]
    return "\n\n".join(parts)


def _shown(pair: Paired, metric: str) -> str:
    """A difference with its interval; costs, which have many digits, with three."""
    if metric not in COSTS or pair.low is None or pair.high is None:
        return str(pair)
    return f"{pair.mean:+.3g} [{pair.low:+.3g}, {pair.high:+.3g}]"


def _entry(claim: Claim, result: str, found: Sequence[tuple[Test, float | None, str]], item: Committed | None) -> str:
    text = f"- {claim.claim} ({claim.source}) **{result[0].upper()}{result[1:]}.**"
    cells = [
        f"`{test.text}`: {_shown(test.pair, claim.metric)}" + ("" if test.sign == "~" else f", p {shown_p(p)}")
        for test, p, _ in found
        if test.pair is not None
    ]
    missing = [f"`{test.text}`" for test, _, _ in found if test.pair is None]
    if cells and item is not None:
        text += f" {item.title}, {METRICS[claim.metric]}: {'; '.join(cells)}."
    if missing:
        text += f" Not measured: {', '.join(missing)}."
    return f"{text} {claim.note}".rstrip()
