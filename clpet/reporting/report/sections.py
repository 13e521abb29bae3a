"""The parts of a report: for runs that can be compared their tables, charts, and the data of the interactive parts."""

from dataclasses import dataclass

from clpet.records import Json, Results, Rows
from clpet.reporting.answers import AnswerData, ReadTexts
from clpet.reporting.comparison import Comparison
from clpet.reporting.recorded_objective import has_labels
from clpet.reporting.report.charts import Chart, charts, measured_charts
from clpet.reporting.report.tables import (
    HtmlTable,
    cost_table,
    data_table,
    measured_table,
    options_table,
    results_table,
)
from clpet.reporting.run_groups import Row, Runs, Section
from clpet.runtime.untrusted_json import read_json, train_command


@dataclass(frozen=True)
class SectionPart:
    """What the page shows of one section. `matrices` and `answers` are the data of its interactive parts."""

    title: str
    tab: str  # a shorter title
    warnings: list[str]
    results: HtmlTable
    charts: list[Chart]
    measured: HtmlTable | None  # probes and downstream tasks
    measured_charts: list[Chart]
    costs: HtmlTable
    options: HtmlTable | None
    data: HtmlTable | None
    commands: list[str]
    matrices: Json
    answers: Json
    num_texts: int  # test texts on the page


def section_part(comparison: Comparison, section: Section, sections: list[Section], texts: ReadTexts) -> SectionPart:
    """Collects everything about one section."""
    notes = [note for note in comparison.notes(section) if not note.startswith("also differs")]  # has a table
    first = next(run for row in section.rows for _, run in row.runs)
    title, answers = comparison.title(section, sections), AnswerData()
    for row in section.rows:
        answers.add(row, texts)
    return SectionPart(
        title=title,
        tab=title.removesuffix(", mean ± standard deviation over seeds"),
        warnings=[
            *[note for note in notes if not note.startswith("also differs")],
            *warnings(section.rows),
            *answers.remarks(),
        ],
        results=results_table(comparison, section),
        charts=charts(section),
        measured=measured_table(section),
        measured_charts=measured_charts(section),
        costs=cost_table(section),
        options=options_table(section),
        data=data_table(first),
        commands=commands(section.rows),
        matrices=matrices_json(section),
        answers=answers.to_json(),
        num_texts=len(answers.texts.ids),
    )


def warnings(rows: list[Row]) -> list[str]:
    """What a reader should know before trusting the figures: remarks on the data, skipped steps, other versions."""
    runs = [run for row in rows for _, run in row.runs]
    lines = [str(line) for run in runs if (data := run.get("data")) for line in data.get("warnings", [])]
    skipped = sum(cost.get("skipped_steps", 0) for run in runs for cost in run["cost"])
    if skipped:
        lines.append(f"{skipped} training steps were skipped because of a NaN or infinite loss")
    for name in ("git", "versions"):
        if len({str(run.get(name)) for run in runs}) > 1:
            lines.append(f"the runs differ in their {name}: see What was run")
    return list(dict.fromkeys(lines))


def commands(rows: list[Row]) -> list[str]:
    """A command per setting, with all of its seeds."""
    settings: dict[tuple[str, ...], list[Results]] = {}
    for row in rows:
        for _, run in row.runs:
            words = tuple(word for word in run["overrides"] if word.partition("=")[0] not in ("seed", "fresh"))
            settings.setdefault(words, []).append(run)
    lines = []
    for words, runs in settings.items():
        seeds = ",".join(dict.fromkeys(str(run["seed"]) for run in runs))
        lines.append(train_command(runs[0], [*(["-m"] if "," in seeds else []), *words, f"seed={seeds}"]))
    return lines


def environment(runs: Runs) -> dict[str, list[str]]:
    """{what: distinct values over the runs} of versions, code revision and hardware."""
    values: dict[str, list[str]] = {}
    for path, run in runs:
        host = read_json(path / "run.json").get("host")
        record = {**run.get("versions", {}), "git": run.get("git"), **(host if isinstance(host, dict) else {})}
        for name, value in record.items():
            if value is not None and str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    return values


def matrices_json(section: Section) -> Json:
    """The matrices of every run by row; the page derives B and F from them, as `TransferMatrix` does."""
    return {
        "lower": section.lower,
        "views": all(has_labels(run) for _, run in section.runs),
        "rows": [
            {
                "name": row.name,
                "runs": [
                    {
                        "seed": run["seed"],
                        "tasks": run["tasks"],
                        "scores": _rounded(run["scores"]),
                        "task_scores": _rounded(run["task_scores"]) if has_labels(run) else None,
                    }
                    for _, run in row.runs
                ],
            }
            for row in section.rows
        ],
    }


def _rounded(rows: Rows) -> Json:
    """Two decimals, which is what the page shows, and five significant digits of a perplexity above 1000."""
    return [[None if value is None else round(value, 2 if abs(value) < 1000 else 0) for value in row] for row in rows]
