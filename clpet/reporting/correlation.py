"""The rank correlation of two figures over the rows of a comparison, such as drift against forgetting over methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import markdown
from clpet.reporting.comparison import PICTURE_FORMATS, Comparison
from clpet.reporting.row_diagnostics import last_values
from clpet.reporting.run_groups import Row, Runs, Section
from clpet.reporting.run_metrics import mean_and_std
from clpet.reporting.significance import NUM_DRAWS
from clpet.reporting.table_statistics import rank_correlation

MIN_ROWS = 4  # of three rows, one bootstrap draw in nine repeats a single row, which has no order


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of the figures `names` over the rows `points`, {row: (x, y)}, with its 95 % interval."""

    title: str
    names: tuple[str, str]
    points: dict[str, tuple[float, float]]
    left_out: dict[str, str]  # {row: reason}
    rho: float
    low: float
    high: float

    def text(self) -> str:
        """One line, and one about the rows that are left out."""
        x, y = self.names
        lines = [
            f"{x} and {y} over {len(self.points)} rows: Spearman's rho {self.rho:+.2f}, 95 % interval "
            f"[{self.low:+.2f}, {self.high:+.2f}] (bootstrap over rows, {NUM_DRAWS} draws)"
        ]
        reasons = dict.fromkeys(self.left_out.values())
        by_reason = {why: ", ".join(row for row, other in self.left_out.items() if other == why) for why in reasons}
        return "\n".join([*lines, *(f"left out, {why}: {rows}" for why, rows in by_reason.items())])


def correlations(comparison: Comparison, runs: Runs, names: tuple[str, str]) -> list[Correlation]:
    """The correlation in every table of a comparison. Raises ConfigError and DataError."""
    if comparison.form not in ("text", "md"):
        raise ConfigError("--correlate adds a line, which only --format text and md print")
    sections = comparison.sections(runs)
    return [correlate(comparison, section, names, comparison.title(section, sections)) for section in sections]


def correlate(comparison: Comparison, section: Section, names: tuple[str, str], title: str) -> Correlation:
    """The correlation of two figures, means over seeds, over the rows of a table. Raises ConfigError and DataError."""
    points, left_out = dict[str, tuple[float, float]](), dict[str, str]()
    figures = {row.name: figures_of(comparison, row, section) for row in section.rows}
    available = list(dict.fromkeys(name for values in figures.values() for name in values))
    for name in names:
        if name not in available:
            raise ConfigError(
                f"--correlate {name}: none of the runs has this metric, cost or probe{suggest(name, available)}"
            )
    for row in section.rows:
        x, y = (figures[row.name].get(name) for name in names)
        if not comparison.competes(row):
            left_out[row.name] = "since the task is given"
        elif x is None or y is None:
            left_out[row.name] = f"without {names[0] if x is None else names[1]}"
        else:
            points[row.name] = x, y
    if len(points) < MIN_ROWS:
        raise DataError(f"--correlate needs {MIN_ROWS} rows with {names[0]} and {names[1]}, there are {len(points)}")
    across, up = np.array(list(points.values())).T
    rho = rank_correlation(across, up)
    if rho is None:
        raise DataError(f"--correlate: {names[0]} or {names[1]} is the same in all rows")
    return Correlation(title, names, points, left_out, rho, *interval(across, up))


def figures_of(comparison: Comparison, row: Row, section: Section) -> dict[str, float]:
    """Metrics, costs, and the last values of probes and downstream tasks, means over the seeds of a row."""
    seeds = [last_values(run["diagnostics"]) for _, run in row.runs]
    names = dict.fromkeys(name for values in seeds for name in values)
    means = {**comparison.means(row, section), **{n: mean_and_std([values.get(n) for values in seeds]) for n in names}}
    return {name: mean.mean for name, mean in means.items() if mean is not None}


def interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of rho over draws of n rows with replacement; constant draws do not count."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(NUM_DRAWS))
    values = [value for rows in draws if (value := rank_correlation(x[rows], y[rows])) is not None]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def report(results: Sequence[Correlation], form: str) -> str:
    """The lines of all tables, with their titles if there are several."""
    texts = [f"{result.title}\n{result.text()}" if len(results) > 1 else result.text() for result in results]
    return "\n\n".join("\n\n".join(map(markdown, text.splitlines())) if form == "md" else text for text in texts)


def draw(results: Sequence[Correlation], path: Path) -> Path:
    """Draws the points of one table into `path`. Raises ConfigError for several tables, and for another ending."""
    from clpet.reporting.plots.correlation import scatter  # matplotlib takes a second to import

    if path.suffix not in PICTURE_FORMATS:
        raise ConfigError(f"--picture {path}: the name must end in {', '.join(PICTURE_FORMATS)}")
    if len(results) > 1:
        titles = "; ".join(result.title for result in results)
        raise ConfigError(
            f"--picture draws one table, but there are {len(results)}: select one with --benchmark ({titles})"
        )
    (result,) = results
    return scatter(
        result.points, result.names, f"{result.title.partition(':')[0]}: {result.text().splitlines()[0]}", path
    )
