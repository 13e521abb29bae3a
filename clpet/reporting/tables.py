"""Tables in the formats of `clpet runs`: text, Markdown, LaTeX with booktabs, and CSV with one value a cell."""

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console

from clpet.escape import inline, latex, markdown, printable, spreadsheet
from clpet.metrics.transfer_matrix import TransferMatrix, round2

Rows = Sequence[Sequence[str]]


def formatted(
    header: Sequence[str], rows: Rows, form: str, words: int = 1, bold: Collection[tuple[int, int]] = ()
) -> str:
    """A table as text, md, csv or tex; its first `words` columns are words, the others figures.

    `bold` are the (row, column) of cells that LaTeX sets in bold.
    """
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(spreadsheet, row) for row in (header, *rows)])
        return text.getvalue().rstrip("\n")
    if form == "md":
        marks = "".join(" --- |" if column < words else " ---: |" for column in range(len(header)))
        lines = [f"| {' | '.join(map(markdown, row))} |" for row in (header, *rows)]
        return "\n".join([lines[0], f"|{marks}", *lines[1:]])
    if form == "tex":
        cells = [
            [rf"\textbf{{{latex(cell)}}}" if (row, column) in bold else latex(cell) for column, cell in enumerate(line)]
            for row, line in enumerate(rows)
        ]
        head, *body = [" & ".join(line) + r" \\" for line in (map(latex, header), *cells)]
        columns = "l" * words + "r" * (len(header) - words)
        begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"])
    return table(header, rows)


MOST = 16  # rows and columns of a matrix on the screen


def say(console: Console, text: str = "") -> None:
    """Prints a text as it is: no markup, no wrapping, nothing that the terminal obeys."""
    console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    cells = [[inline(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip())
    return "\n".join(lines)


def matrix_table(matrix: TransferMatrix, rows: int | None = None) -> str:
    """The transfer matrix as text, rows 0 to `rows`; unmeasured rows are left out, and the middle of a large one."""
    names = ["(before)", *matrix.tasks]
    spell = perplexity if matrix.direction == "lower" else "{:.1f}".format
    body = []
    for index in range(len(matrix) + 1 if rows is None else rows + 1):
        values = matrix.scores[index]
        if (values == values).any():
            body.append([names[index], *_ends(["" if v != v else spell(v) for v in values])])
    return table(["after \\ on", *_ends(matrix.tasks)], _ends(body, ["…"] * (min(len(matrix), MOST + 1) + 1)))


def _ends(items: list[Any], gap: Any = "…") -> list[Any]:
    """A list, or its first and last items where there are more than MOST."""
    return items if len(items) <= MOST else [*items[: MOST // 2], gap, *items[-MOST // 2 :]]


def perplexity(value: float | None) -> str:
    """A perplexity as it is printed: three to five digits."""
    if value is None or value != value:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def summary_line(matrix: TransferMatrix, row: int) -> str:
    """Average and whole score over the tasks seen so far."""
    average, whole = matrix.average(row, row), matrix.whole(row, row)
    if matrix.direction == "lower":
        return f"perplexity: average {perplexity(average)} · whole {perplexity(whole)} on {row} seen domains"
    return f"average {round2(average)} · whole {round2(whole)} on {row} seen tasks"


def is_summary(line: str) -> bool:
    """Whether a line that a run has printed is the summary of a task."""
    return line.startswith(("average ", "perplexity: average ")) and " seen " in line
