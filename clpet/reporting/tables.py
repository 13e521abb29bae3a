"""Tables in the formats of `clpet runs`: text, Markdown, LaTeX with booktabs, and CSV with one value a cell."""

import csv
import io
from collections.abc import Collection, Sequence

from clpet.escape import latex, markdown, spreadsheet
from clpet.reporting.progress import table

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
