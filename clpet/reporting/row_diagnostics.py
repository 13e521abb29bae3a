"""Values measured along with the rows of the matrix, as series: probes, and tasks that are not learned."""

from collections.abc import Mapping, Sequence

from clpet.records import Metrics
from clpet.reporting.tables import table

# Title of a panel of the figure, and the series that it shows.
PANELS = {
    "KL(pretrained || now), nats": ("kl_forward/neutral", "kl_forward/task"),
    "change of NLL, nats": ("nll_drift/neutral",),
    "CKA with the pretrained model": ("cka",),
    "norm of the change / pretrained": ("weight_norm_relative",),
    "plasticity: score of the probe task": ("plasticity",),
    "plasticity: mean loss of the probe task": ("plasticity_loss",),
}
PROBES, DOWNSTREAM = "probe/", "downstream/"  # prefixes of their names in the diagnostics of a row
TITLES = {PROBES: "probes", DOWNSTREAM: "downstream tasks, not learned"}
MEANINGS = {
    "neutral": "neutral text",
    "task": "test texts of the task",
}  # of the second part of a probe's name


def series(diagnostics: Sequence[Metrics], prefix: str) -> dict[str, dict[int, float]]:
    """{name without the prefix: {row of the matrix: value}}, without values of single blocks."""
    values: dict[str, dict[int, float]] = {}
    for row in diagnostics:
        for key, value in row.items():
            name = key.removeprefix(prefix)
            if name != key and value is not None and "/block" not in name:
                values.setdefault(name, {})[int(row["row"] or 0)] = float(value)
    return values


def last_values(diagnostics: Sequence[Metrics]) -> dict[str, float]:
    """{name: value in the last row of the matrix} of all probes, and of downstream tasks with their prefix."""
    last = diagnostics[-1:]
    downstream = {f"{DOWNSTREAM}{name}": by_row for name, by_row in series(last, DOWNSTREAM).items()}
    values: Mapping[str, Mapping[int, float]] = {**series(last, PROBES), **downstream}
    return {name: value for name, by_row in values.items() for value in by_row.values()}


def tables(diagnostics: Sequence[Metrics], tasks: Sequence[str]) -> list[str]:
    """A table for each kind that was measured: a line per name, and a column per row of the matrix."""
    texts = []
    for prefix, title in TITLES.items():
        values = series(diagnostics, prefix)
        rows = sorted({row for by_row in values.values() for row in by_row})
        names = ["(before)", *tasks]
        lines = []
        for name, by_row in values.items():
            lines.append([name, *(f"{by_row[row]:.4g}" if row in by_row else "" for row in rows)])
        if lines:
            texts.append(f"{title}\n{table(['after', *(names[row] for row in rows)], lines)}")
    return texts
