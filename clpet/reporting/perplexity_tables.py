"""Continual pretraining in words and columns: what `clpet show` and the end of a run print of a run of domains."""

from collections.abc import Sequence
from typing import Any

from clpet.metrics.perplexity_transfer import FORMULAS, headline
from clpet.reporting.tables import perplexity, table

NAMED = {"zs": "ZS", "dapt": "DAPT", "cpt": "CPT", "lc": "LC", "fg": "FG"}
AVERAGES = ("zs", "dapt", "cpt", "lc", "fg", "fg_before_last", "cpt_minus_dapt", "lc_minus_dapt")
LEGEND = "ZS zero-shot, DAPT alone on the domain, CPT just after it, LC last checkpoint, FG = LC - CPT (forgotten)"


def domain_table(found: dict[str, Any], bits: Sequence[float | None] = ()) -> str:
    """A row per domain; `bits` are those per byte of the last checkpoint. What no domain has is left out."""
    shown = [key for key in NAMED if any(row[key] is not None for row in found["domains"])]
    rows = [[row["domain"], *(perplexity(row[key]) for key in shown)] for row in found["domains"]]
    header = ["domain", *(NAMED[key] for key in shown)]
    if any(value is not None for value in bits):
        header.append("LC bits/byte")
        rows = [[*row, "-" if value is None else f"{value:.3f}"] for row, value in zip(rows, bits, strict=True)]
    return f"perplexity by domain, lower is better: {LEGEND}\n{table(header, rows)}"


def average_table(found: dict[str, Any]) -> str:
    """Mean and median over domains, all and by group."""
    parts = {"all": found, **found["groups"]}
    shown = [key for key in AVERAGES if any(part["average"][key]["mean"] is not None for part in parts.values())]
    header = ["over domains", *(NAMED.get(key, _spelt(key)) for key in shown)]
    rows = [
        [f"{kind} of {name}", *(perplexity(part["average"][key][kind]) for key in shown)]
        for name, part in parts.items()
        for kind in ("mean", "median")
    ]
    return table(header, rows)


def _spelt(key: str) -> str:
    first, _, rest = key.partition("_")
    return f"{NAMED[first]} {rest.replace('minus', '-').replace('_', ' ').replace('dapt', 'DAPT')}"


def transfer_tables(found: dict[str, Any]) -> str:
    """Backward by age and forward by lead: what a domain's perplexity is after and before its turn."""
    parts = []
    for name, axis, words in (
        ("by_age", "age", "backward transfer by age (domains trained since)"),
        ("by_lead", "lead", "forward transfer by lead (domains until its turn)"),
    ):
        curve = found[name]
        rows = [_line(curve, axis, place) for place in few(len(curve[axis])) if curve["count"][place]]
        if rows:
            header = [axis, "pairs", "mean", "median", "mean - ZS", "median - ZS", "mean ratio to ZS", "mean - own CPT"]
            parts.append(f"{words}; below 0 or 1: better than zero-shot\n{table(header, rows)}")
    return "\n\n".join(parts)


def _line(curve: dict[str, Any], axis: str, place: int) -> list[str]:
    cells = [("perplexity", "mean"), ("perplexity", "median"), ("minus_zs", "mean"), ("minus_zs", "median")]
    ratio = curve["over_zs"]["mean"][place]
    return [
        str(curve[axis][place]),
        str(curve["count"][place]),
        *(perplexity(curve[view][kind][place]) for view, kind in cells),
        "-" if ratio is None else f"{ratio:.3f}",
        perplexity(curve["minus_own"]["mean"][place]),
    ]


def few(count: int) -> list[int]:
    """Positions that show a curve: the first ones, then further and further apart, and the last."""
    places = [0]
    while places[-1] < count - 1:
        places.append(min(count - 1, places[-1] + max(1, places[-1] // 3)))
    return places[:count]


def formula_lines(found: dict[str, Any], needs: str) -> str:
    """Every mean with its formula; `needs` is the command that makes the run which DAPT is read from."""
    values = headline(found)
    width = max(map(len, FORMULAS))
    lines = [
        f"{name:{width}}  {perplexity(values[name]):>8}  {formula}"
        + (f"; needs: {needs}" if "dapt" in name and values[name] is None else "")
        for name, formula in FORMULAS.items()
    ]
    for name in ("backward", "forward"):
        place = found["saturation"][name]["mean"]
        where = "nowhere" if place is None else f"after {place}"
        lines.append(f"{'saturation':{width}}  {where:>8}  from where the mean {name} transfer / ZS stays within 2 %")
    return "\n".join(lines)
