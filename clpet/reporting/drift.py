"""Drift from the pretrained model over a run (evaluation.probes), as series for the table and the figure."""

from collections.abc import Sequence

from clpet.records import Metrics
from clpet.reporting.tables import table

# Title of a panel of the figure, and the series that it shows.
PANELS = {
    "KL(pretrained || now), nats": ("kl_forward/neutral", "kl_forward/task"),
    "change of NLL, nats": ("nll_drift/neutral",),
    "CKA with the pretrained model": ("cka",),
    "norm of the change / pretrained": ("weight_norm_relative",),
}
PREFIX = "probe/"


def series(diagnostics: Sequence[Metrics]) -> dict[str, dict[int, float]]:
    """{name without the prefix: {row of the matrix: value}} of the probes, without those of single blocks."""
    values: dict[str, dict[int, float]] = {}
    for row in diagnostics:
        for key, value in row.items():
            name = key.removeprefix(PREFIX)
            if name != key and value is not None and "/block" not in name:
                values.setdefault(name, {})[int(row["row"] or 0)] = float(value)
    return values


def drift_table(diagnostics: Sequence[Metrics], tasks: Sequence[str]) -> str:
    """A line per probe and a column per measured row of the matrix; '' without probes."""
    values = series(diagnostics)
    rows = sorted({row for by_row in values.values() for row in by_row})
    names = ["(before)", *tasks]
    lines = [
        [name, *(f"{by_row[row]:.4g}" if row in by_row else "" for row in rows)] for name, by_row in values.items()
    ]
    header = ["drift \\ after", *(names[row] for row in rows)]
    return f"drift from the pretrained model\n{table(header, lines)}" if lines else ""
