"""Tables of continual pretraining, printed by `clpet show` and at the end of a run on domains.

`transfer` is in every function the dictionary that `perplexity_transfer.figures` returns.
"""

from collections.abc import Sequence
from typing import Literal

from clpet.metrics.perplexity_transfer import FORMULAS, Axis, headline
from clpet.records import Curve, PerplexityTransfer
from clpet.reporting.tables import perplexity, table

Column = Literal["zs", "dapt", "cpt", "lc", "fg"]
ABBREVIATIONS: dict[Column, str] = {"zs": "ZS", "dapt": "DAPT", "cpt": "CPT", "lc": "LC", "fg": "FG"}
KINDS: tuple[Literal["mean", "median"], ...] = ("mean", "median")
AVERAGES = ("zs", "dapt", "cpt", "lc", "fg", "fg_before_last", "cpt_minus_dapt", "lc_minus_dapt")
LEGEND = (
    "ZS zero-shot, DAPT trained on the domain alone, CPT just after it, LC last checkpoint, FG = LC - CPT (forgotten)"
)


def domain_table(transfer: PerplexityTransfer, bits: Sequence[float | None] = ()) -> str:
    """One row per domain, with the columns that at least one domain has.

    `bits` are the bits per byte of the last checkpoint, one per domain.
    """
    columns = [key for key in ABBREVIATIONS if any(row[key] is not None for row in transfer["domains"])]
    rows = [[row["domain"], *(perplexity(row[key]) for key in columns)] for row in transfer["domains"]]
    header = ["domain", *(ABBREVIATIONS[key] for key in columns)]
    if any(value is not None for value in bits):
        header.append("LC bits/byte")
        rows = [[*row, "-" if value is None else f"{value:.3f}"] for row, value in zip(rows, bits, strict=True)]
    return f"perplexity by domain, lower is better: {LEGEND}\n{table(header, rows)}"


def average_table(transfer: PerplexityTransfer) -> str:
    """Mean and median over all domains, and over each group of domains."""
    groups = {"all": transfer, **transfer["groups"]}
    columns = [key for key in AVERAGES if any(group["average"][key]["mean"] is not None for group in groups.values())]
    header = ["over domains", *(_average_name(key) for key in columns)]
    rows = [
        [f"{kind} of {name}", *(perplexity(group["average"][key][kind]) for key in columns)]
        for name, group in groups.items()
        for kind in KINDS
    ]
    return table(header, rows)


def _average_name(key: str) -> str:
    """A column title: CPT for cpt, and "CPT - DAPT" for cpt_minus_dapt."""
    names = {str(column): name for column, name in ABBREVIATIONS.items()}
    first, _, rest = key.partition("_")
    return names.get(key) or f"{names[first]} {rest.replace('minus', '-').replace('_', ' ').replace('dapt', 'DAPT')}"


def transfer_tables(transfer: PerplexityTransfer) -> str:
    """Backward transfer by age and forward transfer by lead: a domain's perplexity after and before its training."""
    blocks = []
    columns: list[tuple[Curve, Axis, str]] = [
        (transfer["by_age"], "age", "backward transfer by age (domains trained since)"),
        (transfer["by_lead"], "lead", "forward transfer by lead (domains until its turn)"),
    ]
    for curve, axis, title in columns:
        rows = [_curve_row(curve, axis, index) for index in sparse_indices(len(curve[axis])) if curve["count"][index]]
        if rows:
            header = [axis, "pairs", "mean", "median", "mean - ZS", "median - ZS", "mean ratio to ZS", "mean - own CPT"]
            blocks.append(f"{title}; below 0 or 1: better than zero-shot\n{table(header, rows)}")
    return "\n\n".join(blocks)


def _curve_row(curve: Curve, axis: Axis, index: int) -> list[str]:
    views = (curve["perplexity"], curve["minus_zs"])
    ratio = curve["over_zs"]["mean"][index]
    return [
        str(curve[axis][index]),
        str(curve["count"][index]),
        *(perplexity(values[index]) for view in views for values in (view["mean"], view["median"])),
        "-" if ratio is None else f"{ratio:.3f}",
        perplexity(curve["minus_own"]["mean"][index]),
    ]


def sparse_indices(count: int) -> list[int]:
    """Indices to print of a long curve: the first ones, then with growing gaps, and the last."""
    indices = [0]
    while indices[-1] < count - 1:
        indices.append(min(count - 1, indices[-1] + max(1, indices[-1] // 3)))
    return indices[:count]


def formula_lines(transfer: PerplexityTransfer, dapt_command: str) -> str:
    """Every mean with its formula; `dapt_command` makes the run that DAPT is read from."""
    values = headline(transfer)
    width = max(map(len, FORMULAS))
    lines = [
        f"{name:{width}}  {perplexity(values[name]):>8}  {formula}"
        + (f"; needs: {dapt_command}" if "dapt" in name and values[name] is None else "")
        for name, formula in FORMULAS.items()
    ]
    for name, saturation in transfer["saturation"].items():
        index = saturation["mean"]
        start = "nowhere" if index is None else f"after {index}"
        lines.append(f"{'saturation':{width}}  {start:>8}  from where the mean {name} transfer / ZS stays within 2 %")
    return "\n".join(lines)
