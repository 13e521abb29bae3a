"""The report of `clpet data PATH`: what the data could be, their problems, and the command that trains on them."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from clpet.config.compose import compose_config
from clpet.config.overrides import SHORT_KEYS, expand_override
from clpet.data.guess import Kind, Reading
from clpet.data.proposal import Proposal, hydra_value, propose
from clpet.errors import ClpetError, ModelError
from clpet.evaluation.data_inspection import OFTEN, cut_counts, inspect_config
from clpet.records import DataRecord, LabelledDataRecord
from clpet.reporting.tables import table

OTHERS = 4  # further readings that are listed
LONGEST = 512  # tokens, the limit of most encoders
STEP = 32  # tokens
# kind of reading -> option that chooses it
CHOICES = {Kind.labels: "objective=classification", Kind.answers: "objective=text_to_text",
           Kind.texts: "benchmark=text_domains"}  # fmt: skip
SHORT = {full: short for short, full in SHORT_KEYS.items()}


def survey_report(path: Path, given: Mapping[str, str]) -> tuple[str, bool]:
    """(report, whether it has a command) on the data at a path. `given` has the user's options, by their full keys.

    Raises DataError if nothing can be read, and ConfigError for wrong options.
    """
    result = propose(path, given)
    text, works = _inspection(result, given)
    sections = [_description(result), text, _problems(result), command(result, given) if works else ""]
    return "\n\n".join(section for section in sections if section), works


def command(result: Proposal, given: Mapping[str, str]) -> str:
    """The command that trains on the data, as a POSIX shell reads it."""
    return shlex.join(["clpet", "train", *_words(result, given)])


def _words(result: Proposal, given: Mapping[str, str]) -> list[str]:
    """The options of the proposal, except those that the user sets, and the user's."""
    ours = [word for word in result.words() if word.partition("=")[0] not in given]
    return [_short(word) for word in [*ours, *(f"{key}={value}" for key, value in given.items())]]


def _short(word: str) -> str:
    """The word with the short form of its key, where it has one."""
    key, _, value = word.partition("=")
    return f"{SHORT.get(key, key)}={value}"


def _inspection(result: Proposal, given: Mapping[str, str]) -> tuple[str, bool]:
    """(statistics of the benchmark as it would be learned, whether it can be read). Adds to the known problems."""
    try:
        text, record = _inspect(result, given)
        longer = _longer(record) if "benchmark.max_length" not in given else None
        if longer:
            result.options["benchmark.max_length"] = longer
            result.reasons.append(f"many texts are longer than the default length (benchmark.max_length={longer})")
            text, record = _inspect(result, given)
    except ClpetError as error:
        unread = [*result.survey.report.bad_row_lines(), *result.survey.report.notes()]
        result.problems += [*unread, f"cannot be learned yet: {error}"]
        return "", False
    result.problems += [warning for warning in record["warnings"] if warning not in result.problems]
    result.problems += [f"{count} {pair}" for pair, count in record["overlaps"].items() if "test" not in pair]
    return text, True


def _inspect(result: Proposal, given: Mapping[str, str]) -> tuple[str, DataRecord]:
    words = [expand_override(word) for word in _words(result, given)]
    try:
        return inspect_config(compose_config(words), local=True)
    except ModelError as error:
        note = f"lengths are not measured: {error}"
        result.problems += [note] if note not in result.problems else []
        return inspect_config(compose_config(words), tokenize=False)


def _longer(record: DataRecord) -> int | None:
    """The max_length with which most texts are not cut, if many are cut and a longer one is common."""
    if "truncate" not in record:
        return None
    labelled = cast(LabelledDataRecord, record)
    count, total = cut_counts(labelled["tasks"])["texts"]
    if count <= OFTEN * total:
        return None
    length = max(task["tokens"]["p95"] for task in labelled["tasks"].values())
    rounded = min(LONGEST, STEP * math.ceil(length / STEP))
    return rounded if rounded > labelled["max_length"] else None


def _description(result: Proposal) -> str:
    survey = result.survey
    rows = sum(len(table.values) + len(table.bad) for table in survey.tables())
    lines = [f"{survey.path}: {survey.layout.value}" + (f", {rows} rows" if rows else "")]
    if result.columns:
        rows_of = [column.describe() for column in result.columns]
        numbers = table(["column", "type", "empty", "distinct", "words"], [row[:-1] for row in rows_of]).splitlines()
        values = ["most frequent values", *(row[-1] for row in rows_of)]
        lines += [f"{left}  {value}" for left, value in zip(numbers, values, strict=True)]
    lines += ["", f"read as {result.reading.describe()}", *(f"  {reason}" for reason in result.reasons)]
    lines += [f"or as {other.describe()}{_how(other, result.reading)}" for other in result.others[:OTHERS]]
    return "\n".join(lines)


def _how(other: Reading, chosen: Reading) -> str:
    """How to choose another reading of a table."""
    if other.kind is chosen.kind and other.label != chosen.label:
        return f"  (label={hydra_value(other.label)})"
    word = CHOICES.get(other.kind)
    return f"  ({word})" if word and other.kind is not chosen.kind else ""


def _problems(result: Proposal) -> str:
    problems = [*result.survey.problems, *result.problems]
    return "\n".join(["problems and notes:", *(f"  {line}" for line in problems)]) if problems else "no problems"
