"""Guesses what a table is for from summaries of its columns: which one is the text, the label, the task, the answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from clpet.data.column_summary import BOOLEAN, INTEGER, MESSAGES, NUMBER, TEXT, ColumnSummary
from clpet.data.tabular_files import column_names
from clpet.escape import safe_name

# Names of columns by their role.
LABELS = """
    label labels class classes category categories intent topic y target sentiment emotion gold relation type tag stance
    genre
"""
TEXTS = """
    text texts body sentence content document review utterance comment description tweet post x title headline abstract
    message
"""
PROMPTS = "prompt instruction question input query source context problem"
ANSWERS = "answer response output completion target reply solution chosen summary translation"
TASKS = """
    task tasks domain dom dataset subset corpus product year month period quarter language lang region site group
"""
OTHERS = """
    id idx index uid uuid guid url link path file filename date time timestamp user author split set fold score
    confidence
"""
TITLES, BODIES = ("title", "headline", "subject"), ("body", "content", "text", "description", "abstract")

MAX_LABEL_WORDS = 6
MAX_NAME_WORDS = 3  # mean words of a column up to which values that repeat are names, not texts
MAX_TASKS = 50  # values of a column that names the task
TASK_GROUPS = 5  # tasks that labels are divided into, if there are enough of them


class Kind(Enum):
    """What a table can be read as."""

    conversations = "conversations"
    preferences = "preferences"
    labels = "labels"
    answers = "answers"
    texts = "plain text"


@dataclass(frozen=True)
class Reading:
    """One way to read a table: the columns in their roles, and why."""

    kind: Kind
    text: str  # a column, or several as {title} {body}
    label: str = ""  # the column with the label, the answer or the preferred answer
    task: str | None = None
    rejected: str = ""
    reason: str = ""

    def describe(self) -> str:
        """One line for a list of candidates."""
        if self.kind is Kind.conversations:
            return f"conversations in {safe_name(self.text)}: {self.reason}"
        if self.kind is Kind.texts:
            return f"plain text in {safe_name(self.text)}: {self.reason}"
        task = f", task {safe_name(self.task)}" if self.task else ""
        return f"{self.kind.value}: text {safe_name(self.text)}, label {safe_name(self.label)}{task}: {self.reason}"


def named(column: str, words: str) -> bool:
    """Whether a column's name, or the part after its last dot, is one of the words, in any case and with any ending."""
    name = column.rpartition(".")[2].lower().strip()
    parts = name.replace("-", "_").split("_")
    return name in words.split() or parts[0] in words.split() or parts[-1] in words.split()


def label_score(column: ColumnSummary) -> float:
    """How much a column looks like the label; 0 if it cannot be."""
    types = set(column.types)
    names_things = types <= {TEXT, INTEGER, BOOLEAN} or (
        types <= {TEXT, INTEGER, BOOLEAN, NUMBER} and column.distinct <= 20
    )
    repeats = 2 <= column.distinct <= max(2, column.filled / 2)
    short = column.words <= MAX_LABEL_WORDS or named(column.name, LABELS)
    if not (names_things and repeats and short and 2 * column.empty <= column.rows):
        return 0
    by_name = 4 * named(column.name, LABELS) - 3 * named(column.name, f"{OTHERS} {TASKS}")
    return max(0.1, 1 + by_name + (column.words <= 3) + (column.distinct <= column.filled / 5))


def text_score(column: ColumnSummary) -> float:
    """How much a column looks like the text; 0 if it cannot be."""
    if column.numeric or 2 * column.types[TEXT] < column.filled or column.distinct < 2 or column.filled == 0:
        return 0
    is_text = named(column.name, f"{TEXTS} {PROMPTS}")
    if not is_text and column.words <= MAX_NAME_WORDS and column.distinct <= column.filled / 5:
        return 0
    by_name = 3 * is_text - 4 * named(column.name, OTHERS)
    return max(0.1, min(column.words, 30) / 10 + by_name + column.distinct / column.filled)


def task_candidates(columns: Sequence[ColumnSummary]) -> list[ColumnSummary]:
    """The columns whose name and few values may name the task."""
    return [
        column for column in columns
        if named(column.name, TASKS) and not column.empty and set(column.types) <= {TEXT, INTEGER}
        and 2 <= column.distinct <= min(MAX_TASKS, column.filled / 4)
    ]  # fmt: skip


def unnamed_task_candidates(columns: Sequence[ColumnSummary], reading: Reading) -> list[ColumnSummary]:
    """The columns without another role whose few values, not their names, may name the task."""
    roles = (*column_names(reading.text), reading.label, reading.rejected)
    return [
        column for column in columns
        if column.name not in roles and not column.empty and not column.numeric and column.words <= MAX_NAME_WORDS
        and set(column.types) == {TEXT} and 2 <= column.distinct <= min(MAX_TASKS, column.filled / 4)
        and not named(column.name, OTHERS)
    ]  # fmt: skip


def not_labels(columns: Sequence[ColumnSummary]) -> list[str]:
    """Why columns that are named like a label, but whose values do not repeat, are not labels."""
    return [
        f"column {safe_name(column.name)} has {column.distinct} different values in {column.filled} rows: "
        + ("numbers are not labels" if column.numeric else "a label occurs in several rows")
        for column in columns
        if not label_score(column) and 2 * column.distinct > column.filled > 0 and named(column.name, LABELS)
    ]


def readings(columns: Sequence[ColumnSummary], chosen: Mapping[str, str] | None = None) -> list[Reading]:
    """The ways to read a table, the likeliest first. `chosen` has columns for text, label and task that are given."""
    chosen = chosen or {}
    columns = [column for column in columns if column.name != chosen.get("task")]  # it has no other role
    candidates = [
        *_conversations(columns),
        *_preferences(columns),
        *_answers(columns, chosen),
        *_labels(columns, chosen),
        *_texts(columns, chosen),
    ]
    return [reading for _, reading in sorted(candidates, key=lambda pair: -pair[0])]


def _conversations(columns: Sequence[ColumnSummary]) -> list[tuple[float, Reading]]:
    return [
        (100, Reading(Kind.conversations, column.name, reason="lists of messages with role and content"))
        for column in columns
        if 2 * column.types[MESSAGES] > column.filled
    ]


def _preferences(columns: Sequence[ColumnSummary]) -> list[tuple[float, Reading]]:
    names = {column.name.lower(): column.name for column in columns}
    prompt = next((names[word] for word in PROMPTS.split() if word in names), None)
    if not prompt or not {"chosen", "rejected"} <= names.keys():
        return []
    reason = "columns named chosen and rejected"
    task = next((column.name for column in task_candidates(columns)), None)
    reading = Reading(Kind.preferences, prompt, names["chosen"], task, names["rejected"], reason)
    return [(90, reading)]


def _answers(columns: Sequence[ColumnSummary], chosen: Mapping[str, str]) -> list[tuple[float, Reading]]:
    """A prompt and an answer by their names. Answers that repeat are more likely labels."""
    prompts = [c for c in columns if text_score(c) and _given(c, "text", chosen, named(c.name, PROMPTS))]
    answers = [c for c in columns if c.distinct > 1 and _given(c, "label", chosen, named(c.name, ANSWERS))]
    answers = [c for c in answers if c not in prompts]
    if not prompts or not answers:
        return []
    answer = max(answers, key=lambda column: column.words)
    names = {column.name.lower(): column.name for column in prompts}
    text = prompts[0].name if len(prompts) == 1 else max(prompts, key=text_score).name
    if {"instruction", "input"} <= names.keys() and "text" not in chosen:
        text = f"{{{names['instruction']}}} {{{names['input']}}}"
    free = not label_score(answer) or answer.distinct > answer.filled / 5
    task = chosen.get("task") or next((column.name for column in task_candidates(columns)), None)
    reason = f"{answer.distinct} different answers in {answer.filled} rows"
    return [(50 if free else 20, Reading(Kind.answers, text, answer.name, task, reason=reason))]


def _labels(columns: Sequence[ColumnSummary], chosen: Mapping[str, str]) -> list[tuple[float, Reading]]:
    """Every candidate for the label with the best text column that is left."""
    result = []
    for label in columns:
        score = label_score(label) if "label" not in chosen else 10 * (label.name == chosen["label"])
        texts = [column for column in columns if column is not label and _given(column, "text", chosen)]
        texts = [column for column in texts if text_score(column) or "text" in chosen]
        if not score or not (texts or "{" in chosen.get("text", "")):
            continue
        tasks = [column.name for column in task_candidates(columns) if column is not label]
        reason = f"{label.distinct} values in {label.filled} rows"
        if named(label.name, LABELS):
            reason += " of a column that is named like a label"
        text = chosen.get("text") or _joined(texts)
        task = chosen.get("task") or next((task for task in tasks if task != text), None)
        result.append((30 + score, Reading(Kind.labels, text, label.name, task, reason=reason)))
    return result


def _texts(columns: Sequence[ColumnSummary], chosen: Mapping[str, str]) -> list[tuple[float, Reading]]:
    texts = [column for column in columns if text_score(column) and _given(column, "text", chosen)]
    if not texts:
        return []
    best = max(texts, key=text_score)
    return [(10, Reading(Kind.texts, best.name, reason=f"{best.words:.0f} words per row, no label needed"))]


def _joined(texts: Sequence[ColumnSummary]) -> str:
    """The best text column, or a title and a body together."""
    names = {column.name.lower(): column.name for column in texts}
    title = next((names[name] for name in TITLES if name in names), None)
    body = next((names[name] for name in BODIES if name in names), None)
    if title and body and title.isidentifier() and body.isidentifier():
        return f"{{{title}}} {{{body}}}"
    return max(texts, key=text_score).name


def _given(column: ColumnSummary, role: str, chosen: Mapping[str, str], otherwise: bool = True) -> bool:
    return column.name == chosen[role] if role in chosen else otherwise


def labels_per_task(num_labels: int) -> int | None:
    """Labels per task that give up to TASK_GROUPS tasks of at least two labels; None if there are too few labels."""
    if num_labels < 4:
        return None
    return math.ceil(num_labels / min(TASK_GROUPS, num_labels // 2))
