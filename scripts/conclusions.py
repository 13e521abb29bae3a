"""What the committed tables say about a practitioner's questions, computed from results/TABLE/BUDGET/*.json."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clpet.config.table_spec import TableSpec, read_table, table_files
from clpet.escape import markdown
from clpet.reporting.result_table import ResultTable
from clpet.reporting.run_metrics import MeanStd, mean_and_std
from clpet.reporting.significance import holm
from clpet.reporting.table_row import TableRow
from clpet.reporting.table_statistics import Paired, one_sample, paired_difference, rank_correlation, root

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
REFERENCES = ("ncm", "slda", "knn", "replay", "joint", "independent")  # rows that the winner is compared with
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Committed:
    """A table with committed results."""

    name: str
    budget: str
    spec: TableSpec
    table: ResultTable

    @property
    def title(self) -> str:
        """Its name and budget, as in a heading."""
        return f"{self.name}, budget {self.budget}"

    @property
    def model(self) -> str:
        """The words that choose the model."""
        return " ".join(word for word in self.spec.words if word.startswith("model"))

    @property
    def rows(self) -> list[TableRow]:
        """The rows that learn the tasks one after the other without the task at test, the best first."""
        return [row for row in self.table.rows if not row.is_bound]

    def row(self, name: str) -> TableRow | None:
        """The row of a name, or None if it was not measured."""
        return next((row for row in self.table.rows if row.name == name), None)


@cache
def committed(results: Path = RESULTS) -> list[Committed]:
    """The tables with results, those with the most runs first; smoke budgets are left out."""
    tables = []
    for name in table_files():
        spec = read_table(name)
        for budget in spec.budgets:
            folder = results / name / budget
            if budget != "smoke" and any(folder.glob("*.json")):
                table = ResultTable.read(spec.with_budget(budget, []), budget, folder)
                tables.append(Committed(name, budget, spec.with_budget(budget, []), table))
    return sorted(tables, key=lambda item: -sum(len(row.values) for row in item.table.rows))


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns are aligned to the left. Columns without a value are left out."""
    shown = [index for index in range(len(header)) if index < words or any(row[index] not in ("-", "") for row in rows)]
    header, rows = [header[index] for index in shown], [[row[index] for index in shown] for row in rows]
    sides = ["---" if index < words else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, sides, *rows))


def with_interval(row: TableRow) -> str:
    """The mean final average of a row with its 95 % interval."""
    value = row.interval()
    if value is None:
        return "-"
    return f"{value.mean:.2f}" + ("" if value.low is None else f" [{value.low:.2f}, {value.high:.2f}]")


def shown_p(p: float | None) -> str:
    """A p-value; "-" without a test."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def corrected(pairs: Sequence[Paired | None]) -> list[float | None]:
    """The p-values after Holm's correction; None for comparisons that have no test."""
    tested = [index for index, pair in enumerate(pairs) if pair is not None and pair.p is not None]
    values = holm([pairs[index].p for index in tested])
    by_index = dict(zip(tested, values, strict=True))
    return [by_index.get(index) for index in range(len(pairs))]


def better(a: TableRow, b: TableRow) -> Paired | None:
    """By how much a is better than b in final average."""
    return b.minus(a) if a.lower else a.minus(b)


def kilobytes(row: TableRow) -> float | None:
    """What a row keeps between tasks, old examples included, in kB."""
    stored, replay = row.mean("stored_bytes"), row.mean("replay_bytes")
    return None if stored is None else (stored.mean + (replay.mean if replay else 0)) / 1000


def keeps_examples(row: TableRow) -> bool:
    """Whether old examples are stored."""
    replay = row.mean("replay_bytes")
    return replay is not None and replay.mean > 0


def labels_per(spec: TableSpec) -> str:
    """The number of training examples of a label or task, in words."""
    for word in reversed(spec.words):
        if match := re.fullmatch(r"(?:benchmark\.)?(shots|per_label|max_train)=(\d+)", word):
            unit = "task" if match[1] == "max_train" else "label"
            return f"at most {match[2]} training texts of every {unit}"
    return "all training texts"


def memory(tables: Sequence[Committed]) -> str:
    """For every table the rows that are better than all that keep less, from the smallest memory to the largest."""
    lines = []
    for item in tables:
        sized = [(size, row) for row in item.rows if (size := kilobytes(row)) is not None and row.mean("average")]
        best: TableRow | None = None
        for size, row in sorted(sized, key=lambda pair: pair[0]):
            if best is None or ((gap := better(row, best)) is not None and gap.mean > 0):
                best = row
                examples = row.mean("replay_bytes")
                lines.append(
                    [item.title, labels_per(item.spec), f"{size:,.0f} kB", f"{(examples.mean if examples else 0) / 1000:,.0f} kB",
                     f"`{row.name}`", with_interval(row)]
                )  # fmt: skip
    header = ("table", "labels", "kept in all", "of it old examples", "row", "average")
    return grid(header, lines, words=2)


def trains(row: TableRow) -> bool:
    """Whether a row trains parameters."""
    trained = row.mean("trained_parameters")
    return trained is not None and trained.mean > 0


def headline(item: Committed) -> Iterator[str]:
    """The best row, the best one that trains something, and the bounds, in a sentence."""
    if not item.rows:
        return
    best = item.rows[0]
    text = f"**{item.title}** ({labels_per(item.spec)}): `{best.name}` is best with {with_interval(best)}"
    trained = next((row for row in item.rows if trains(row)), None)
    if trained is not None and trained is not best:
        text += (
            f"; it trains nothing, and the best row that does, `{trained.name}`, is behind by {better(best, trained)}"
        )
    named = (("sequential", "sequential fine-tuning reaches"), ("joint", "joint training on all tasks together"),
             ("independent", "a model per task, chosen by the given task,"), ("dapt", "a model for each domain"))  # fmt: skip
    parts = [
        f"{words} {with_interval(row)}"
        for name, words in named
        if (row := item.row(name)) is not None and row is not best
    ]
    yield f"{text}.{' Also: ' + ', '.join(parts) + '.' if parts else ''}"


def winner(item: Committed) -> list[list[str]]:
    """The best row of a table and the best one that trains something against the reference rows.

    Cells: table, row, other, difference with its interval, p after Holm.
    """
    if not item.rows:
        return []
    chosen = [item.rows[0], *[row for row in item.rows if trains(row)][:1]]
    lines = [
        (row, other)
        for row in dict.fromkeys(row.name for row in chosen)
        for other in REFERENCES
        if other != row and item.row(other) is not None
    ]
    pairs = [better(item.row(row), item.row(other)) for row, other in lines]
    return [
        [item.title, f"`{row}`", f"`{other}`", str(pair or "-"), shown_p(p)]
        for (row, other), pair, p in zip(lines, pairs, corrected(pairs), strict=True)
    ]


def widest(tables: Sequence[Committed]) -> list[Committed]:
    """Of every table and model the budget with the most rows, of equal ones that with the most runs."""
    ranked = sorted(tables, key=lambda item: (len(item.table.rows), sum(len(row.values) for row in item.table.rows)))
    best = {(item.name, item.model): item for item in ranked}
    return [item for item in tables if item in best.values()]


def replay_or_not(item: Committed) -> Iterator[str]:
    """The best row with old examples against the best one without."""
    groups = [[row for row in item.rows if keeps_examples(row) is kept] for kept in (True, False)]
    if not all(groups):
        return
    with_old, without = (group[0] for group in groups)
    means = [mean_and_std([mean.mean for row in group if (mean := row.mean("average"))]) for group in groups]
    yield (
        f"{item.title}: the best row with old examples is `{with_old.name}` ({with_interval(with_old)}), "
        f"the best one without `{without.name}` ({with_interval(without)}): a difference of "
        f"{better(with_old, without)}. The mean of the {len(groups[0])} rows with old examples is "
        f"{_mean(means[0])}, that of the {len(groups[1])} without {_mean(means[1])}."
    )
    plain = [
        (row.mean("replay_bytes").mean / 1000, row)
        for row in item.rows
        if "method=replay" in row.words and keeps_examples(row)
    ]
    if len(plain) > 1:
        steps = [
            f"`{row.name}` ({size:,.0f} kB) {with_interval(row)}"
            for size, row in sorted(plain, key=lambda pair: pair[0])
        ]
        yield f"{item.title}: plain replay by what it keeps: {', '.join(steps)}."
    for name in ("ncm", "slda"):
        if (row := item.row(name)) is not None:
            above, below = apart(row, item.rows)
            yield (
                f"{item.title}: of {len(item.rows) - (row in item.rows)} other rows {len(above)} are above `{name}`, which "
                f"trains nothing ({', '.join(f'`{other}`' for other in above) or 'none'}), {len(below)} are below, and the "
                "rest are undecided (5 % after Holm)."
            )


def apart(reference: TableRow, rows: Sequence[TableRow]) -> tuple[list[str], list[str]]:
    """The names of the rows that are better than a reference and of those that are worse, at 5 % after Holm."""
    others = [row for row in rows if row is not reference]
    pairs = [better(row, reference) for row in others]
    clear = [
        (row.name, pair.mean)
        for row, pair, p in zip(others, pairs, corrected(pairs), strict=True)
        if pair is not None and p is not None and p < LEVEL
    ]
    return [name for name, mean in clear if mean > 0], [name for name, mean in clear if mean < 0]


def _mean(value: MeanStd | None) -> str:
    return "-" if value is None else f"{value.mean:.2f}"


def task_id(item: Committed) -> Iterator[str]:
    """What it is worth that the task of a test example is given."""
    gaps = {row.name: paired_difference(row.scores("task_average"), row.scores()) for row in item.rows}
    values = {name: gap for name, gap in gaps.items() if gap is not None}
    if not values or item.table.lower:
        return
    best = item.rows[0].name
    largest, smallest = (pick(values, key=lambda name: values[name].mean) for pick in (max, min))
    text = f"{item.title}: given the task, so that only its own labels compete, "
    if best in values:
        text += f"the best row, `{best}`, gains {values[best]}; "
    yield (
        f"{text}the mean over the {len(values)} rows is {_gain(list(values.values()))}, from "
        f"{values[smallest].mean:+.2f} (`{smallest}`) to {values[largest].mean:+.2f} (`{largest}`)."
    )


def _gain(gaps: Sequence[Paired]) -> str:
    return f"{sum(gap.mean for gap in gaps) / len(gaps):+.2f}"


def tuning(item: Committed) -> Iterator[str]:
    """What the choice of the options in the grid is worth."""
    gains = {row.name: gain for row in item.table.rows if (gain := row.gain()) is not None}
    if not gains:
        return
    clear = [name for name, gain in gains.items() if gain.low is not None and gain.low > 0]
    worse = [name for name, gain in gains.items() if gain.high is not None and gain.high < 0]
    kept = sum(gain.mean == 0 for gain in gains.values())
    most = sorted(gains, key=lambda name: -gains[name].mean)[:3]
    overall = one_sample([gain.mean for gain in gains.values()])
    yield (
        f"{item.title}: the values chosen on validation data gain {overall} over the defaults, mean and interval over "
        f"{len(gains)} tuned rows; the interval of a row is above 0 for {len(clear)}, below 0 for {len(worse)}, and "
        f"the gain is exactly 0 for {kept}. The largest: "
        f"{', '.join(f'`{name}` {gains[name]}' for name in most)}."
    )
    tuned = {name: mean.mean for name, _, mean in item.table.tuning()}
    default = {name: mean.mean for name, mean, _ in item.table.tuning()}
    correlation = rank_correlation(list(default.values()), list(tuned.values()))
    free = [name for name in default if (row := item.row(name)) is not None and not row.is_bound]
    pick = min if item.table.lower else max
    if correlation is not None and free:
        first, second = pick(free, key=lambda name: default[name]), pick(free, key=lambda name: tuned[name])
        yield (
            f"{item.title}: the rank correlation of the rows with defaults and tuned is {correlation:.2f}; the best trained "
            f"row is `{first}` with defaults ({default[first]:.2f}) and `{second}` tuned ({tuned[second]:.2f}), first order."
        )


def order(item: Committed) -> Iterator[str]:
    """What the order of the tasks contributes."""
    values, correlation = item.table.variances(), item.table.order_correlation()
    if values is None:
        return
    text = (
        f"{item.title}: the standard deviation of an average is {root(values.orders):.2f} between orders and "
        f"{root(values.seeds):.2f} between seeds"
    )
    widest = max(
        (row for row in item.rows if row.variances() is not None),
        key=lambda row: row.variances().orders, default=None,
    )  # fmt: skip
    if widest is not None:
        text += f"; the order matters most to `{widest.name}` ({root(widest.variances().orders):.2f})"
    ranks = "" if correlation is None else f" The rank correlation of the rows between orders is {correlation:.2f}."
    yield f"{text}.{ranks}"


QUESTIONS = (  # title, answer, whether every budget of a table answers it
    ("Replay or not", replay_or_not, False),
    ("What the task id is worth", task_id, False),
    ("What tuning is worth", tuning, True),
    ("What the order of the tasks is worth", order, True),
)


def conclusions(tables: Sequence[Committed]) -> str:
    """The section of the page; a sentence without figures while nothing is committed."""
    if not tables:
        return "No table is committed yet: `clpet reproduce TABLE` makes one."
    main = widest(tables)
    rows = [line for item in main for line in winner(item)]
    parts = [
        "\n".join(f"- {line}" for item in main for line in headline(item)),
        "### Which method at which memory and label budget",
        "From the smallest memory to the largest, every row that is better than all that keep less. What is kept: weights and\n"
        "statistics in addition to the frozen backbone, and old examples as token ids.",
        memory(main),
        "### The winner against rows that need no training, and against replay",
        "The best row, and the best one that trains something. Difference in final average with its 95 % interval,\n"
        "and p of the paired test after Holm. The winner was chosen by the same runs, so that its lead is an upper estimate. `joint` learns all tasks together,\n"
        "`independent` is given the task.",
        grid(("table", "best row", "other", "difference", "p (Holm)"), rows, words=3),
    ]
    for title, question, every in QUESTIONS:
        lines = [f"- {line}" for item in (tables if every else main) for line in question(item)]
        parts += [f"### {title}", "\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def name_cell(row: TableRow) -> str:
    """The name of a row, and the values chosen for it."""
    return f"{markdown(row.name)}{' (' + markdown(' '.join(row.chosen)) + ')' if row.chosen else ''}"
