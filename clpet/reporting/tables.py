"""Tables as text, Markdown, LaTeX (booktabs) and CSV, and the transfer matrix as text."""

import csv
import io
from collections.abc import Collection, Sequence
from typing import TypeVar

from rich.console import Console

from clpet.escape import inline, latex, markdown, printable, spreadsheet
from clpet.metrics.transfer_matrix import TransferMatrix, round2

TableRows = Sequence[Sequence[str]]
MAX_SHOWN = 16  # most rows and columns of a matrix on the screen

T = TypeVar("T")


def say(console: Console, text: str = "") -> None:
    """Prints a text literally: no markup, no wrapping, no control characters that a terminal would execute."""
    console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def format_table(
    header: Sequence[str], rows: TableRows, form: str, words: int = 1, bold: Collection[tuple[int, int]] = ()
) -> str:
    """A table in the format `form`: text, md, csv or tex.

    The first `words` columns hold words (aligned left), the others numbers (aligned right). `bold` are the (row,
    column) of cells that LaTeX sets in bold.
    """
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(spreadsheet, row) for row in (header, *rows)])
        return text.getvalue().rstrip("\n")
    if form == "md":
        alignment = "".join(" --- |" if column < words else " ---: |" for column in range(len(header)))
        lines = [f"| {' | '.join(map(markdown, row))} |" for row in (header, *rows)]
        return "\n".join([lines[0], f"|{alignment}", *lines[1:]])
    if form == "tex":
        return _latex_table(header, rows, words, bold)
    return table(header, rows)


def _latex_table(header: Sequence[str], rows: TableRows, words: int, bold: Collection[tuple[int, int]]) -> str:
    cells = [
        [rf"\textbf{{{latex(cell)}}}" if (row, column) in bold else latex(cell) for column, cell in enumerate(line)]
        for row, line in enumerate(rows)
    ]
    head, *body = [" & ".join(line) + r" \\" for line in (map(latex, header), *cells)]
    columns = "l" * words + "r" * (len(header) - words)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"])


def table(header: Sequence[str], rows: TableRows) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    cells = [[inline(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip())
    return "\n".join(lines)


def matrix_table(matrix: TransferMatrix, rows: int | None = None) -> str:
    """The transfer matrix as text, up to row `rows`; without unmeasured rows and without the middle of a large one."""
    names = ["(before)", *matrix.tasks]
    spell = perplexity if matrix.direction == "lower" else "{:.1f}".format
    body: list[Sequence[str]] = []
    for index in range(len(matrix) + 1 if rows is None else rows + 1):
        values = matrix.scores[index]
        if (values == values).any():
            body.append([names[index], *_ends(["" if v != v else spell(v) for v in values], "…")])
    return table(["after \\ on", *_ends(matrix.tasks, "…")], _ends(body, ["…"] * (min(len(matrix), MAX_SHOWN + 1) + 1)))


def _ends(items: list[T], gap: T) -> list[T]:
    """The list, or its first and last items with a gap between if it has more than MAX_SHOWN."""
    return items if len(items) <= MAX_SHOWN else [*items[: MAX_SHOWN // 2], gap, *items[-MAX_SHOWN // 2 :]]


def spell_score(value: float | None, direction: str) -> str:
    """A perplexity where lower is better, else percent with two decimals; "-" for a missing one."""
    return perplexity(value) if direction == "lower" or value is None else f"{value:.2f}"


def perplexity(value: float | None) -> str:
    """A perplexity with three to five digits."""
    if value is None or value != value:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def summary_line(matrix: TransferMatrix, row: int) -> str:
    """Average over the tasks seen so far (each counts the same), and over all their test examples (`whole`)."""
    average, micro = matrix.average(row, row), matrix.micro_average(row, row)
    if matrix.direction == "lower":
        domains = f"{row} seen domain{'s' * (row > 1)}"
        return f"perplexity: average {perplexity(average)} · whole {perplexity(micro)} on {domains}"
    return f"average {round2(average)} · whole {round2(micro)} on {row} seen task{'s' * (row > 1)}"
