"""Writes docs/results.md and docs/failures.md from the committed tables: `python -m scripts.results_page`.

Figures come from results/TABLE/BUDGET/*.json, claims from results/claims.yaml, and everything written by hand from
results/text/: introduction.md, tables/TABLE_BUDGET.md (below a table), earlier/*.md (older measurements), drift.md,
failures.md. A test compares the committed pages with this script's output.
"""

from collections.abc import Sequence
from pathlib import Path

from clpet.reporting.result_table import FIGURE, SHOWN_COSTS
from clpet.reporting.run_costs import COSTS
from clpet.reporting.table_row import TableRow
from clpet.reporting.table_statistics import root
from scripts.claims import read_claims, section
from scripts.conclusions import (
    RESULTS,
    ROOT,
    Committed,
    better,
    committed,
    conclusions,
    grid,
    name_cell,
    shown_p,
    with_interval,
)

TEXT = RESULTS / "text"
WRITTEN = "*Written by `python -m scripts.results_page` from `results/`: committed figures and hand-written texts.*"
NEAR = 2.0  # points above sequential fine-tuning from which on a method counts as working
FAR = 5.0  # points below the published figure


def text(name: str, folder: Path = TEXT) -> str:
    """A hand-written text; '' if there is none."""
    file = folder / name
    return file.read_text().strip() if file.is_file() else ""


def scores(item: Committed) -> str:
    """The table of scores: the best row first."""
    tests = item.table.tests()
    rows = []
    for row in item.table.rows:
        means = [str(row.mean(name) or "-") for name in ("task_average", "forgetting")]
        rows.append([name_cell(row), with_interval(row), shown_p(tests.get(row.name)), *means])
    return grid(("row (values chosen for it)", "average", "p (Holm)", "own labels", "forgetting"), rows)


def costs(item: Committed) -> str:
    """The table of what tuning and the order contribute, and of costs."""
    rows = []
    for row in item.table.rows:
        gain, variances, default = row.gain(), row.variances(), row.default_mean()
        rows.append([
            name_cell(row).partition(" ")[0], f"{default.mean:.2f}" if default else "-", str(gain or "-"),
            *(("-", "-") if variances is None else (f"{root(value):.2f}" for value in variances)),
            *(COSTS[name].form.format(cost.mean) if (cost := row.mean(name)) else "-" for name in SHOWN_COSTS),
        ])  # fmt: skip
    header = (
        "row",
        "default",
        "gain of tuning",
        "std orders",
        "std seeds",
        *(name.replace("_", " ") for name in SHOWN_COSTS),
    )
    return grid(header, rows)


def published(item: Committed) -> str:
    """Published figures next to ours; '' if the table has none."""
    rows = []
    for row in item.table.rows:
        if (figure := item.table.published.get(row.name)) and (mean := row.mean("average")):
            gap = f"{mean.mean - figure.average:+.2f}"
            rows.append(
                [f"`{row.name}`", f"{mean.mean:.2f}", f"{figure.average:g}", gap, figure.source, figure.why or "-"]
            )
    return grid(("row", "here", "published", "gap", "source", "why"), rows) if rows else ""


def table_section(item: Committed) -> str:
    """A table with its command, hours, figure and hand-written text."""
    folder = f"../results/{item.name}/{item.budget}"
    runs = sum(row.num_runs for row in item.table.rows)
    seeds, orders = len(item.spec.seeds), len(item.spec.orders)
    tuned = [len(row.trials) for row in item.table.rows if row.trials]
    trials = f"{max(tuned)} trials on validation data for each of {len(tuned)} rows" if tuned else "nothing is tuned"
    grids = "; ".join(f"{key} in {', '.join(map(str, values))}" for key, values in item.spec.grid.items())
    parts = [
        f"## {item.title}",
        f"    clpet reproduce {item.name} --budget {item.budget}",
        f"{item.table.title}. {labels_sentence(item)} {seeds} seed{'s' * (seeds > 1)} in {orders} "
        f"order{'s' * (orders > 1)} of the tasks, {trials}{f' ({grids})' if tuned else ''}; {runs} runs with "
        f"{item.table.hours():.1f} hours of training and evaluation in all. Mean [95 % interval] of the final average; p: "
        f"paired test against `{item.table.reference.name}` after Holm. [All figures]({folder}/table.csv).",
        scores(item),
    ]
    if item.table.tuning():
        parts.append(f"![Default against tuned for every row]({folder}/{FIGURE}.svg)")
    explained = {
        "Gain of tuning: how much better than the default, first order.": item.table.tuning(),
        "Standard deviations of an average between orders of the tasks and between seeds.": item.table.variances(),
        "Costs are means over runs.": True,
    }
    parts += [
        " ".join(sentence for sentence, shown in explained.items() if shown),
        costs(item),
        *item.table.order_lines(),
        published(item),
        text(f"tables/{item.name}_{item.budget}.md"),
    ]
    return "\n\n".join(part for part in parts if part)


def labels_sentence(item: Committed) -> str:
    """How the budget differs from the whole table, by its words."""
    words = [word for word in item.spec.words if word.startswith(("benchmark.", "tasks=", "max_", "train."))]
    return f"Set: `{' '.join(words)}`." if words else "All of its data."


def results_page(tables: Sequence[Committed]) -> str:
    """docs/results.md."""
    earlier = [file.read_text().strip() for file in sorted((TEXT / "earlier").glob("*.md"))]
    parts = [
        "# Results",
        WRITTEN,
        text("introduction.md"),
        "## Conclusions",
        text("conclusions.md"),
        conclusions(tables),
        *(table_section(item) for item in tables),
        "## Claims of papers",
        text("claims.md"),
        section(tables, read_claims()),
        "## Earlier measurements",
        *earlier,
        text("drift.md"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def not_above_sequential(item: Committed) -> str:
    """The rows that are less than NEAR points better than sequential fine-tuning, with what was tried."""
    sequential = item.row("sequential")
    if sequential is None:
        return ""
    others = [row for row in item.table.rows if row is not sequential]
    lines = [
        [f"`{row.name}`", with_interval(row), str(pair), tried(row)]
        for row in others
        if (pair := better(row, sequential)) is not None and pair.mean < NEAR
    ]
    if not lines:
        return f"Every row is at least {NEAR:g} points above sequential fine-tuning."
    return grid(("row", "average", "better than sequential by", "tried: average on validation data"), lines)


def tried(row: TableRow) -> str:
    """The trials of a row with their validation scores, the chosen one in bold."""
    cells = []
    for words, score in row.trials:
        cell = f"{' '.join(words)}: {'-' if score is None else f'{score:.1f}'}"
        cells.append(f"**{cell}**" if words == row.chosen else cell)
    return ", ".join(cells) or "defaults only"


def far_from_paper(item: Committed) -> str:
    """The rows whose average is more than FAR points below the published figure; '' if there are none."""
    lines = []
    for row in item.table.rows:
        figure, mean = item.table.published.get(row.name), row.mean("average")
        if figure and mean and (mean.mean - figure.average) * (-1 if row.lower else 1) < -FAR:
            lines.append([f"`{row.name}`", f"{mean.mean:.2f}", f"{figure.average:g}", figure.source, figure.why or "-"])
    return grid(("row", "here", "published", "source", "why"), lines) if lines else ""


def failures_page(tables: Sequence[Committed]) -> str:
    """docs/failures.md."""
    parts = ["# What did not work", WRITTEN, text("failures_introduction.md")]
    for item in tables:
        parts += [
            f"## {item.title}",
            f"Average of `sequential`: {sequential_average(item)}.",
            not_above_sequential(item),
        ]
        if far := far_from_paper(item):
            parts += [f"More than {FAR:g} points below the published figure:", far]
    return "\n\n".join(part for part in [*parts, text("failures.md")] if part) + "\n"


def sequential_average(item: Committed) -> str:
    """The average of sequential fine-tuning with its interval."""
    row = item.row("sequential")
    return with_interval(row) if row else "not measured"


def pages() -> dict[str, str]:
    """{file in docs/: its text}."""
    tables = committed()
    return {"results.md": results_page(tables), "failures.md": failures_page(tables)}


if __name__ == "__main__":
    for name, page in pages().items():
        (ROOT / "docs" / name).write_text(page)
        print(f"docs/{name}: {len(page.splitlines())} lines")
