"""drift.png and downstream.png: what was measured along with the rows of the matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clpet.records import Metrics
from clpet.reporting.plots.canvas import new_panels, save, short
from clpet.reporting.row_diagnostics import DOWNSTREAM, MEANINGS, PANELS, PROBES, series


def draw(diagnostics: Sequence[Metrics], tasks: Sequence[str], folder: Path, title: str) -> list[Path]:
    """Draws what the diagnostics hold: drift.png with a panel per probe, downstream.png with a panel per task."""
    paths = []
    values = series(diagnostics, PROBES)
    panels = {name: [key for key in keys if key in values] for name, keys in PANELS.items()}
    if any(panels.values()):
        curves = {name: {_label(key): values[key] for key in keys} for name, keys in panels.items() if keys}
        paths.append(_panels(curves, tasks, folder / "drift.png", f"{title}: probes"))
    by_task: dict[str, dict[str, dict[int, float]]] = {}
    for name, by_row in series(diagnostics, DOWNSTREAM).items():
        task, _, metric = name.rpartition("/")
        by_task.setdefault(task, {})[metric] = by_row
    if by_task:
        paths.append(_panels(by_task, tasks, folder / "downstream.png", f"{title}: downstream tasks"))
    return paths


def _label(key: str) -> str:
    return MEANINGS.get(key.rpartition("/")[2], key)


def _panels(
    curves: Mapping[str, Mapping[str, Mapping[int, float]]], tasks: Sequence[str], path: Path, title: str
) -> Path:
    """One panel per name in `curves`, with a curve over the rows of the matrix for each of its series."""
    figure, axes = new_panels(1 + (2.2 + 0.18 * len(tasks)) * len(curves), 3.6, len(curves))
    for panel, (name, lines) in zip(axes, curves.items(), strict=True):
        for label, by_row in lines.items():
            panel.plot(list(by_row), list(by_row.values()), marker="o", label=label)
        panel.set_title(short(name) if len(name) > 40 else name, fontsize=10)
        panel.set_xticks(range(len(tasks) + 1), ["before", *map(short, tasks)], rotation=30, ha="right", fontsize=8)
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)
