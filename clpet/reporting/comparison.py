"""Finished runs compared: figures with their spread over seeds, what else differs between rows, and paired tests."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import inline, markdown
from clpet.metrics import perplexity_transfer
from clpet.metrics.perplexity_transfer import DAPT
from clpet.metrics.transfer_matrix import CONVENTIONS
from clpet.reporting.figures import Spread, figures, pretraining_figures, spread, validation_average
from clpet.reporting.run_groups import (
    GIVEN,
    SPLIT,
    Group,
    Row,
    Section,
    differing,
    fingerprint,
    on_validation,
    sections,
    value_of,
)
from clpet.reporting.significance import DRAWS, SAMPLED, Difference, difference, holm
from clpet.reporting.tables import formatted

COLUMNS = ("average", "whole", "bwt", "fwt", "forgetting", "learning_accuracy")  # of a comparison, by default
LOSSES = ("forgetting", "intransigence")  # of accuracies: lower is better
TIDY = ("benchmark", "objective", "metric", "data", "split", "view")  # columns of CSV, before the options


@dataclass
class Comparison:
    """What is compared, and how: `keys` are options; `own` takes the task-incremental view of the predictions.

    `by_validation` shows, of all settings of a row, the one that is best on validation. `against` names the row that
    the others are tested against; without it that is the best one.
    """

    keys: list[str]
    metrics: list[str] = field(default_factory=list)
    own: bool = False
    by_validation: bool = False
    against: str | None = None
    form: str = "text"

    def report(self, runs: Group) -> str:
        """What `clpet runs --compare` prints. Raises ConfigError and DataError where there is nothing to compare."""
        known = {**CONVENTIONS, **perplexity_transfer.FORMULAS}
        for metric in self.metrics:
            if metric not in known:
                raise ConfigError(f"there is no metric {metric}{suggest(metric, known)}")
        found = self.sections(runs)
        if self.against is not None:
            if self.form not in ("text", "md"):
                raise ConfigError("--against adds tests, which only --format text and md print")
            if not any(self.named(section) for section in found):
                names = [f"'{row.name}'" for section in found for row in section.rows]
                raise ConfigError(f"--against {self.against}: there is no such row{suggest(self.against, names)}")
        if self.form == "csv":
            return self.tidy(found)
        return "\n\n".join(part for section in found for part in self.parts(section, found))

    def sections(self, runs: Group) -> list[Section]:
        """The tables, their rows in order."""
        found = sections(runs, self.keys)
        if self.own:
            found = [section for section in found if not section.lower]
            if not found:
                raise ConfigError("--view own is about labels, and these runs have perplexities: leave it out")
        if not self.by_validation:
            return found
        chosen = on_validation(found, lambda runs: mean.mean if (mean := self.on_validation(runs)) else None)
        if not chosen:
            raise DataError(
                "--by validation: no run was measured on validation (train with evaluation.split=validation)"
            )
        return chosen

    def spreads(self, group: Group, runs: Group) -> dict[str, Spread | None]:
        """Every figure of a group over its seeds; None unless all of them have it."""
        found = [figures(run, runs, self.own) for _, run in group]
        columns = {name: [one.get(name) for one in found] for name in (found[0] if found else ())}
        return {name: spread(values) for name, values in columns.items()}

    def best(self, section: Section, rows: list[Row]) -> Row | None:
        """The row with the best final average; None where no row has one."""
        means = [(found.mean, row) for row in rows if (found := self.spreads(row.runs, section.runs).get("average"))]
        return (min if section.lower else max)(means, key=lambda one: one[0])[1] if means else None

    # Text, Markdown and LaTeX

    def parts(self, section: Section, found: list[Section]) -> list[str]:
        """A section's table with what is said about it, and its tests."""
        lines = [self.title(section, found), *self.notes(section)]
        if self.form != "text":
            lines = [f"% {inline(line)}" if self.form == "tex" else markdown(line) for line in lines]
        gap = "\n\n" if self.form == "md" else "\n"
        tests = self.tests(section) if self.form != "tex" and not section.lower else []
        return [gap.join([lines[0], self.table(section), *lines[1:]]), *([gap.join(tests)] if tests else [])]

    def title(self, section: Section, found: list[Section]) -> str:
        """What the figures of a section are."""
        data, others = "", [other.rows[0] for other in found if other.benchmark == section.benchmark]
        if section.data and {fingerprint(row.evidence[0][1]) for row in others} != {section.data}:
            own = [key for key in differing(others) if key.startswith("benchmark.")]
            data = ", ".join(
                [f"data {section.data[:8]}", *(f"{key}={section.rows[0].options.get(key)}" for key in own)]
            )
            data = f" ({data})"
        parts = [
            section.metric + (", lower is better" if section.lower else " in %"),
            "among each task's own labels (task-incremental view)" if self.own else "",
            "measured on validation" if section.split != "test" else "",
            "settings chosen on validation, figures on test" if self.by_validation else "",
            "mean ± standard deviation over seeds",
        ]
        return f"{section.benchmark}{data}: {', '.join(filter(None, parts))}"

    def table(self, section: Section) -> str:
        """Rows of options and figures."""
        metrics = self.shown(section)
        spreads = [self.spreads(row.runs, section.runs) for row in section.rows]
        rows = [
            [
                *row.cells,
                *([str(row.tried), str(self.on_validation(row.chosen_by))] if self.by_validation else []),
                str(len(row.runs)),
                *(str(found.get(metric) or "-") for metric in metrics),
            ]
            for row, found in zip(section.rows, spreads, strict=True)
        ]
        header = [*section.columns, *(["settings", "validation"] if self.by_validation else []), "seeds", *metrics]
        start, words = len(header) - len(metrics), len(section.columns)
        bold = {
            (place, start + column)
            for column, metric in enumerate(metrics)
            for place in self.leading(section, [found.get(metric) for found in spreads], metric)
        }
        return formatted(header, rows, self.form, words, bold)

    def shown(self, section: Section) -> Sequence[str]:
        """The figures of a section's table."""
        return self.metrics or (perplexity_transfer.COLUMNS if section.lower else COLUMNS)

    def on_validation(self, runs: Group) -> Spread | None:
        """The final average on validation of a setting."""
        return spread([validation_average(run, self.own) for _, run in runs])

    def leading(self, section: Section, column: Sequence[Spread | None], metric: str) -> list[int]:
        """Places of the best values of a column as printed; rows that are given the task do not compete."""
        means = {
            place: round(found.mean, 2)
            for place, (row, found) in enumerate(zip(section.rows, column, strict=True))
            if found and self.competes(row)
        }
        best = (min if section.lower or metric in LOSSES else max)(means.values(), default=None)
        return [place for place, mean in means.items() if mean == best]

    def competes(self, row: Row) -> bool:
        """Whether a row answers the same question as the others: it is not given the task where they are not."""
        return self.own or not row.given

    def notes(self, section: Section) -> list[str]:
        """What a reader has to know of a table."""
        found = [f"also differs: {key}: {_owners(section.rows, key)}" for key in section.others]
        if len({frozenset(run["tasks"]) for row in section.rows for _, run in row.evidence}) > 1:
            found.append("the task lists differ: averages are over different tasks")
        if few := [row.name for row in section.rows if len(row.runs) < SAMPLED]:
            which = "" if len(few) == len(section.rows) else f" ({'; '.join(few)})"
            found.append(
                f"fewer than {SAMPLED} seeds{which}: tests sample {section.split} examples, seeds are not sampled"
            )
        if section.left_out:
            found.append(f"left out, since it has no runs on validation: {'; '.join(section.left_out)}")
        pending = [row for row in section.rows if not row.runs]
        return [*found, *(f"not run on test yet: {row.name}: {test_command(row)}" for row in pending)]

    # Tests

    def named(self, section: Section) -> Row | None:
        """The row that --against names, by its first value or all of them. Raises ConfigError where several fit."""
        rows = [row for row in section.rows if row.name == self.against]
        rows = rows or [row for row in section.rows if next(iter(row.columns.values())) == self.against]
        if len(rows) > 1:
            names = "; ".join(f"--against '{row.name}'" for row in rows)
            raise ConfigError(f"--against {self.against} names {len(rows)} rows; take {names}")
        return rows[0] if rows else None

    def tests(self, section: Section) -> list[str]:
        """Head, table and remarks of the paired tests of one row against the others."""
        rows = [row for row in section.rows if row.runs]
        base = self.named(section) if self.against else self.best(section, [row for row in rows if self.competes(row)])
        if base is None or not base.runs or len(rows) < 2:
            return []
        found: dict[str, Difference] = {}
        refused = []
        for row in rows:
            if row is base:
                continue
            easier = next((one for one in (row, base) if not self.competes(one)), None)
            why = f"{easier.name} is given the task at test (--view own gives it to all)" if easier else ""
            result = why or difference(base.runs, row.runs, self.own)
            if isinstance(result, Difference):
                found[row.name] = result
            else:
                refused.append(f"not tested: {base.name} against {row.name}: {result}")
        corrected = holm([one.p for one in found.values()])
        cells = [
            [name, f"{one.value:+.2f}", f"[{one.low:+.2f}, {one.high:+.2f}]",
             f"{one.p:.4f}", f"{p:.4f}", str(one.seeds)]
            for (name, one), p in zip(found.items(), corrected, strict=True)
        ]  # fmt: skip
        over = f"over {section.split} examples, and over seeds where at least {SAMPLED} are paired ({DRAWS} draws)"
        head = f"{base.name} minus each other row, final average score: paired bootstrap {over}"
        head += f"; p (Holm) is corrected for {len(cells)} comparisons" if len(cells) > 1 else ""
        header = ["other", "difference", "95 % interval", "p", "p (Holm)", "paired seeds"]
        if self.form == "md":
            head, refused = markdown(head), [markdown(line) for line in refused]
        return [*([head, formatted(header, cells, self.form)] if cells else []), *refused]

    # CSV

    def tidy(self, found: list[Section]) -> str:
        """One line a row and figure, one value a cell, all sections in one table."""
        options = list(dict.fromkeys(key for section in found for key in (*section.columns, GIVEN, *section.others)))
        lines, view = [], "own" if self.own else "all"
        for section in found:
            for row in section.rows:
                named = [row.columns.get(key) or value_of(row.options, key) or "" for key in options]
                kind = [section.benchmark, section.objective, section.metric, fingerprint(row.evidence[0][1])]
                spreads = self.spreads(row.runs, section.runs)
                cells = [(section.split, metric, spreads.get(metric)) for metric in self.shown(section)]
                if self.by_validation:
                    cells.append(("validation", "average", self.on_validation(row.chosen_by)))
                lines += [[*kind, split, view, *named, name, *_numbers(found)] for split, name, found in cells]
        return formatted([*TIDY, *options, "figure", "mean", "std", "n"], lines, "csv")

    # Pictures

    def picture(self, runs: Group, path: Path) -> Path:
        """Rows of perplexities side by side. Raises ConfigError where they are not of one table."""
        from clpet.reporting.plots.perplexity import plot_groups

        found = self.sections(runs)
        lower = [section for section in found if section.lower and section.split == "test"]
        if not lower:
            raise ConfigError("--picture draws perplexities on test, which these runs do not have: leave it out")
        if len(lower) > 1:
            titles = "; ".join(self.title(section, found) for section in lower)
            raise ConfigError(f"--picture draws one table, and there are {len(lower)}: say --benchmark ({titles})")
        (section,) = lower
        groups = {
            row.name: [pretraining_figures(run, section.runs) for _, run in row.runs if run["method"] != DAPT]
            for row in section.rows
        }
        drawn = {name: own for name, own in groups.items() if own}
        return plot_groups(drawn, ", ".join(self.keys), path, section.benchmark)


def _numbers(found: Spread | None) -> list[str]:
    if found is None:
        return ["", "", "0"]
    return [repr(round(found.mean, 6)), "" if found.std is None else repr(round(found.std, 6)), str(found.n)]


def _owners(rows: Sequence[Row], key: str) -> str:
    """Each value of an option with the rows that have it, named by their first column where that is enough."""
    values = [value_of(row.options, key) or "-" for row in rows]
    short = {row.cells[0]: value for row, value in zip(rows, values, strict=True)}
    clear = all(short[row.cells[0]] == value for row, value in zip(rows, values, strict=True))
    names: dict[str, dict[str, None]] = {}
    for row, value in zip(rows, values, strict=True):
        names.setdefault(value, {})[row.cells[0] if clear else row.name] = None
    return ", ".join(f"{value} ({'; '.join(own)})" for value, own in names.items())


def test_command(row: Row) -> str:
    """The command that measures on test what was chosen on validation."""
    seeds = ",".join(sorted({str(run["seed"]) for _, run in row.chosen_by}))
    words = row.chosen_by[0][1]["overrides"]
    kept = [word for word in words if word.partition("=")[0] not in (SPLIT, "seed", "fresh")]
    return shlex.join(["clpet", "train", *(["-m"] if "," in seeds else []), *kept, f"seed={seeds}"])
