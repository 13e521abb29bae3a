"""The figures that every finished run gets, chosen by what its transfer matrix holds: scores or perplexities."""

from collections.abc import Sequence
from pathlib import Path

from clpet.metrics.perplexity_transfer import figures
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Metrics, OrderRecord
from clpet.reporting.plots import row_diagnostics
from clpet.reporting.plots.loss import loss_curve
from clpet.reporting.plots.perplexity import by_position, order_heatmap, perplexity_heatmap, transfer_curves
from clpet.reporting.plots.transfer_matrix import accuracy_curves, transfer_heatmap
from clpet.reporting.step_lines import read_steps


def draw(
    out: Path,
    matrix: TransferMatrix,
    title: str,
    order: OrderRecord | None = None,
    diagnostics: Sequence[Metrics] = (),
) -> list[Path]:
    """Draws a run's figures into its directory and returns their paths.

    `order` is the record of the task order; order.png is drawn where it holds the similarities of the domains, and
    drift.png and downstream.png where the `diagnostics` hold probes and downstream tasks.
    """
    steps = read_steps(out)
    paths = [loss_curve(steps, out / "loss.png", title)] if steps else []
    paths += row_diagnostics.draw(diagnostics, matrix.tasks, out, title)
    if matrix.direction == "higher":
        return [
            transfer_heatmap(matrix, out / "transfer.png", title),
            accuracy_curves(matrix, out / "accuracy.png", title),
            *paths,
        ]
    paths += [
        perplexity_heatmap(matrix, out / "transfer.png", title),
        by_position(matrix, out / "domains.png", title),
        transfer_curves(figures(matrix.scores, matrix.tasks), out / "transfer_curves.png", title),
    ]
    if order and order.get("similarity"):
        paths.append(order_heatmap(order, out / "order.png", title))
    return paths
