"""drift.png: how far the model has moved from the pretrained one after every task."""

from collections.abc import Sequence
from pathlib import Path

from clpet.records import Metrics
from clpet.reporting.drift import PANELS, series
from clpet.reporting.plots.canvas import new_panels, save, short

LABELS = {"neutral": "neutral text", "task": "test texts of the task"}


def drift_curves(diagnostics: Sequence[Metrics], tasks: Sequence[str], path: Path, title: str) -> Path | None:
    """One panel per probe of PANELS that was measured; None without any."""
    values = series(diagnostics)
    panels = {name: [key for key in keys if key in values] for name, keys in PANELS.items()}
    panels = {name: keys for name, keys in panels.items() if keys}
    if not panels:
        return None
    figure, axes = new_panels(1 + (2.2 + 0.18 * len(tasks)) * len(panels), 3.6, len(panels))
    for panel, (name, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            by_row = values[key]
            panel.plot(list(by_row), list(by_row.values()), marker="o", label=LABELS.get(key.rpartition("/")[2], key))
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(tasks) + 1), ["before", *map(short, tasks)], rotation=30, ha="right", fontsize=8)
        panel.grid(alpha=0.3)
        if len(keys) > 1:
            panel.legend(fontsize=8)
    figure.suptitle(f"{title}: drift from the pretrained model", fontsize=11)
    return save(figure, path)
