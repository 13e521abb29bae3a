"""From what a file or folder contains to the options of the run that learns it, with the reasons for each choice."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clpet.config.compose import conf_dir
from clpet.config.overrides import HYDRA_FUNCTION, needs_no_quotes, quote
from clpet.data.column_summary import ColumnSummary, column_summaries
from clpet.data.data_files import TEXTS, domain_files, stem, subfolders, suffix
from clpet.data.guess import (
    MAX_TASKS,
    TASKS,
    Kind,
    Reading,
    labels_per_task,
    named,
    not_labels,
    readings,
    unnamed_task_candidates,
)
from clpet.data.read_report import ReadReport
from clpet.data.row_problems import RowProblems
from clpet.data.survey import Layout, Survey, survey
from clpet.data.tabular_files import TableLayout, column_names, no_columns
from clpet.errors import DataError
from clpet.escape import safe_name, short_repr

MANY_TEXTS = 20  # txt files of a folder above which they are documents of one domain rather than a domain each
FEW_TEXTS, LONG_TEXT = 5, 1000  # texts of a folder, and words of one, that make a domain likelier than a label
LONG_ANSWER = 3  # words of an average answer above which answers are scored by overlap
COLUMN_KEYS = {"text": "benchmark.text", "label": "benchmark.label", "task": "benchmark.task"}

Options = dict[str, object]


@dataclass
class Proposal:
    """How the data at a path are read and learned. `options` are those of the command, by their full keys."""

    survey: Survey
    columns: list[ColumnSummary]
    reading: Reading
    others: list[Reading]
    options: Options = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def words(self) -> list[str]:
        """The words of the command, KEY=VALUE, as Hydra reads them."""
        return [f"{key}={hydra_value(value, key)}" for key, value in self.options.items()]


def propose(path: Path, given: Mapping[str, str]) -> Proposal:
    """The proposal for the data at a path; `given` has options that the user has chosen. Raises DataError."""
    header = given.get("benchmark.header")
    names = [name.strip(" '\"") for name in header.strip("[]").split(",")] if header else None
    result = _read(path, TableLayout(given.get("benchmark.encoding"), names), given)
    kind, is_folders = result.reading.kind, result.survey.layout is Layout.task_tables
    if kind is Kind.texts:
        unused = [f"{role}={given[key]}" for role, key in COLUMN_KEYS.items() if role != "text" and key in given]
        if unused:
            raise DataError(f"{path} is read as plain text, without labels and tasks: remove {' and '.join(unused)}")
        _plain_text(result)
    elif kind is Kind.conversations:
        _conversations(result)
    else:
        _table_options(result, is_folders)
        _check_rows(result)
    unread = [key for key in ("benchmark.encoding", "benchmark.header") if key in result.survey.options]
    if unread and kind in (Kind.texts, Kind.conversations):
        what = "; ".join(result.survey.problems)
        raise DataError(
            f"{what}. Files of {kind.value} are read as UTF-8 and with a header row: convert the file first"
        )
    if kind is not Kind.texts:
        result.options.update(result.survey.options)
    return result


def _read(path: Path, layout: TableLayout, given: Mapping[str, str]) -> Proposal:
    looked_at = survey(path, layout)
    if looked_at.layout is Layout.texts:
        return Proposal(looked_at, [], Reading(Kind.texts, "text", reason="files of text"), [])
    columns = column_summaries(looked_at.tables())
    if looked_at.layout is Layout.label_folders:
        candidates = _folders_of_texts(looked_at, columns)
    else:
        candidates = _table_readings(looked_at, columns, given)
    candidates.sort(key=lambda reading: reading.kind is not _preferred(given))  # stable: the likeliest of a kind first
    if not candidates:
        shown = ", ".join(safe_name(column.name) for column in columns)
        parts = [f"{path} has no column of text; its columns are {shown or 'missing'}", *_empty_columns(columns)]
        raise DataError("; ".join(parts))
    result = Proposal(looked_at, columns, candidates[0], candidates[1:], problems=_empty_columns(columns))
    unnamed = [column for column in columns if column.name not in (result.reading.label, result.reading.text)]
    if result.reading.kind in (Kind.labels, Kind.texts):
        result.problems += not_labels(unnamed)
    return result


def _empty_columns(columns: list[ColumnSummary]) -> list[str]:
    return [
        f"column {safe_name(column.name)} is empty in all {column.rows} rows"
        for column in columns
        if column.rows and not column.filled
    ]


def _preferred(given: Mapping[str, str]) -> Kind | None:
    """The kind of reading that the user's benchmark or objective needs."""
    by_benchmark = {"text_domains": Kind.texts, "chat": Kind.conversations}
    by_objective = {
        "text_to_text": Kind.answers, "classification": Kind.labels, "preference": Kind.preferences,
        "language_modeling": Kind.texts,
    }  # fmt: skip
    usual = Kind.labels if given.get("benchmark") in ("files", "folders") and "objective" not in given else None
    return by_benchmark.get(given.get("benchmark", "")) or by_objective.get(given.get("objective", "")) or usual


def _folders_of_texts(looked_at: Survey, columns: list[ColumnSummary]) -> list[Reading]:
    """Labels, or domains where the folders have few or very long texts."""
    files = Counter(str(row["label"]) for rows in looked_at.rows[""].values() for row in rows.values)
    words = next((column.words for column in columns if column.name == "text"), 0)
    fewest, most = min(files.values(), default=0), max(files.values(), default=0)
    counts = f"{fewest} to {most} texts of {words:.0f} words per folder"
    labels = Reading(Kind.labels, "text", "label", reason=f"the names of the folders, {counts}")
    domains = Reading(Kind.texts, "text", reason=f"a domain per folder, {counts}")
    few_or_long = fewest < FEW_TEXTS or words > LONG_TEXT
    return [domains, labels] if few_or_long else [labels, domains]


def _table_readings(looked_at: Survey, columns: list[ColumnSummary], given: Mapping[str, str]) -> list[Reading]:
    """The readings with the columns that the user names. Raises DataError if these are missing or cannot be labels."""
    chosen = {role: given[key].strip("'\"") for role, key in COLUMN_KEYS.items() if given.get(key, "null") != "null"}
    available = {name for rows in looked_at.tables() for name in rows.columns}
    missing = [name for column in chosen.values() for name in column_names(column) if name not in available]
    if missing and available:
        raise DataError("; ".join([no_columns(looked_at.path, missing, available), *looked_at.problems]))
    if "label" in chosen and chosen["label"] in (chosen.get("task"), chosen.get("text")):
        raise DataError(f"label={chosen['label']} is also the column of the task or the text: name another column")
    result = readings(columns, chosen)
    needs_label = [f"{role}={chosen[role]}" for role in ("label", "task") if role in chosen]
    if needs_label and result and all(reading.kind is Kind.texts for reading in result):
        reasons = not_labels([column for column in columns if column.name != chosen.get("task")])
        raise DataError(
            f"{looked_at.path} has no column of labels for {' '.join(needs_label)}; "
            + "; ".join([*reasons, "label=COLUMN names one"])
        )
    return result


def _plain_text(result: Proposal) -> None:
    """A folder or file per domain, or one domain of many small files."""
    path, root = result.survey.path, result.survey.path
    is_table = result.survey.layout in (Layout.table, Layout.task_tables)
    unread = {suffix(Path(rows.origin)) for rows in result.survey.tables() if is_table} - set(TEXTS)
    if unread and not domain_files(path, ReadReport()):
        raise DataError(
            f"{path} has texts without labels, and {', '.join(sorted(unread))} is not read as plain text: write them "
            "as .jsonl, .parquet or .txt, take one file alone, or name the label column with label=COLUMN"
        )
    result.options |= {"benchmark": "text_domains"}
    splits_in_root = bool(result.survey.rows) and path.is_dir() and result.survey.layout is Layout.table
    if path.is_dir() and not subfolders(path):
        names = list(domain_files(path, result.survey.report))
        if splits_in_root or len(names) > MANY_TEXTS:
            root = path.absolute().parent
            result.options["benchmark.domains"] = [path.absolute().name]
            result.reasons.append(f"the {len(names)} files of {path} are one domain; in folders they would be several")
    result.options |= {"data_dir": root, "model": "gpt2", "method": "sequential"}
    if result.reading.text != "text":
        result.options["benchmark.text"] = result.reading.text
    if result.survey.report.bad_rows:
        result.options["benchmark.skip_bad"] = True
    if _size(path) < 1e6:
        result.options["benchmark.test_share"] = 0.1
        result.reasons.append("less than 1 MB of text: a tenth of it is held out as test (benchmark.test_share)")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _conversations(result: Proposal) -> None:
    if not (conf_dir() / "benchmark" / "chat.yaml").is_file():
        raise DataError(f"{result.survey.path} has conversations, which no benchmark reads")
    result.options |= {"benchmark": "chat", "data_dir": result.survey.path, "model": "qwen3_0_6b", "method": "replay"}
    if result.reading.text != "messages":
        result.options["benchmark.messages"] = result.reading.text


def _table_options(result: Proposal, is_folders: bool) -> None:
    reading = result.reading
    result.options |= {"benchmark": "folders" if is_folders else "files", "data_dir": result.survey.path}
    if reading.kind is Kind.answers:
        result.options |= {"objective": "text_to_text", "model": "t5_base", "method": "replay"}
        if next((c.words for c in result.columns if c.name == reading.label), 0) > LONG_ANSWER:
            result.options["benchmark.metric"] = "rouge_l"
            result.reasons.append("long answers are scored by overlap (benchmark.metric)")
    if reading.kind is Kind.preferences:
        result.options |= {"objective": "preference", "model": "gpt2", "method": "replay"}
        if reading.rejected != "rejected":
            result.options["objective.rejected"] = reading.rejected
    for role, usual, column in (("text", "text", reading.text), ("label", "label", reading.label)):
        if column != usual:
            result.options[COLUMN_KEYS[role]] = column
    if is_folders:
        result.reasons.append(f"a task for each of {len(result.survey.rows)} folders or files")
    elif reading.task:
        result.options["benchmark.task"] = reading.task
        result.reasons.append(f"the tasks are the values of {safe_name(reading.task)}")
    for summary in result.columns:
        if named(summary.name, TASKS) and summary.empty and 2 <= summary.distinct <= MAX_TASKS:
            name = safe_name(summary.name)
            result.reasons.append(f"{name} may name the task, but {summary.empty} cells are empty (task={name})")


def _label_groups(result: Proposal, num_labels: int) -> None:
    """Groups of labels as tasks, where nothing else divides the rows."""
    size = labels_per_task(num_labels)
    if size:
        result.options["benchmark.classes_per_task"] = size
        result.reasons.append(f"no column names a task: groups of {size} labels are the tasks, in alphabetical order")
    else:
        result.reasons.append(f"no column names a task, and {num_labels} labels are too few to divide: one task")
    for column in unnamed_task_candidates(result.columns, result.reading):
        word = f"task={hydra_value(column.name)}"
        result.reasons.append(f"column {safe_name(column.name)} could name the task: add {word}")


def _check_rows(result: Proposal) -> None:
    """Collects the problems of all rows, and the options that leave out what cannot be learned."""
    reading, labels = result.reading, result.reading.kind is Kind.labels
    bad, names = result.survey.report, set()
    unseen: list[str] = []
    for task, splits in result.survey.rows.items():
        rows = RowProblems()
        for split, table in splits.items():
            table.require(*column_names(reading.text), reading.label)
            rows.add(split, table, reading.text, reading.label, labels)
        prefix = f"{safe_name(task)}: " if task else ""
        result.problems += [prefix + line for line in rows.describe(reading.label, labels)]
        if not splits.get("test") and labels:
            result.reasons.append(f"{prefix}no test file: a quarter of its rows is held out (benchmark.test_share)")
        for file, errors in rows.bad.bad_rows.items():
            for error, numbers in errors.items():
                for number in numbers:
                    bad.add_bad_row(file, error, number)
        unseen += rows.unseen() if labels else []
        names |= set(rows.train_labels())
    if bad.bad_rows:
        result.options["benchmark.skip_bad"] = True
        result.reasons.append("bad rows are dropped (benchmark.skip_bad)")
    if unseen and result.options["benchmark"] == "files":
        result.options["benchmark.drop_labels"] = unseen
    if labels and result.survey.layout is not Layout.task_tables and not reading.task:
        _label_groups(result, len(names))


def hydra_value(value: object, key: str = "") -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    text = without_reference(value)
    if isinstance(value, int | float):
        return text
    if key == "data_dir":  # prepared by clpet, which quotes ordinary paths itself
        return quote(text) if set(",$'\"\\") & set(text) or HYDRA_FUNCTION.fullmatch(text) else text
    return text if needs_no_quotes(text) and text.lower() != "null" else quote(text)


def without_reference(value: object) -> str:
    """The value as text. Raises DataError for one that a configuration would replace by something else."""
    text = str(value)
    if "${" in text:
        raise DataError(f"{short_repr(text)} contains ${{, which a configuration reads as a reference: rename it")
    return text


def default_name(path: Path) -> str:
    """A name for the benchmark of the data at a path."""
    base = stem(path.absolute()) if path.is_file() else path.absolute().name
    return re.sub(r"\W+", "_", base.lower(), flags=re.ASCII).strip("_") or "mine"
