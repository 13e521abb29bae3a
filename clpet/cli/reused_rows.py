"""`clpet reproduce --reuse`: the rows of a table whose files have figures that need not be computed again."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from clpet.cli.parallel_runs import environments
from clpet.cli.table_plan import TablePlan, compose
from clpet.config.build import parse_config
from clpet.errors import ClpetError
from clpet.records import Json
from clpet.reporting.table_row import TableRow
from clpet.runs import provenance
from clpet.wiring import Components

log = logging.getLogger(__name__)


def reuse(plan: TablePlan, folder: Path, parallel: int = 1) -> tuple[TablePlan, list[str]]:
    """(the plan without the runs whose figures are in the files of its rows in a folder, lines on what is reused).

    The file of a row is reused as a whole or not at all: its trials, seeds, orders and signatures must be those of the
    plan. Raises ConfigError if a reused row was measured on other data, or needs further runs, which would have other
    versions or hardware here with `parallel` runs at the same time.
    """
    reused, lines = dict[str, TableRow](), []
    for name in plan.spec.rows:
        if (file := folder / f"{name}.json").is_file():
            row = TableRow.read(file)
            if reason := mismatch(plan, name, row):
                lines.append(f"not reused: {file}, {reason}")
            else:
                reused[name] = row
    runs = sum(row.num_runs for row in reused.values())
    lines.insert(0, f"reused: {runs} runs of {len(reused)} of {len(plan.spec.rows)} rows in {folder}")
    plan = replace(plan, reused=reused)
    for row in reused.values():
        check_conditions(plan, row, parallel)
    return plan, lines


def mismatch(plan: TablePlan, name: str, row: TableRow) -> str:
    """Why the figures of a file are not those of a row of the plan; "" if they are."""
    if row.name != name:
        return f"which is of a row {row.name}"
    if [words for words, _ in row.trials] != list(plan.spec.trials(name)):
        return "which has other trials"
    runs = (*row.values, *row.defaults)
    if any(order >= len(plan.spec.orders) or seed not in plan.spec.seeds for order, seed in runs):
        return "which has other seeds or orders"
    if row.trials and (0, plan.spec.seeds[0]) not in row.values:  # trials have the first seed and order
        return "whose trials had another seed"
    for trial, signatures in ((row.chosen, row.signatures), ([], row.default_signatures)):
        recorded = {(order, signature) for (order, _), signature in signatures.items()}  # without the seed
        if any(plan.run(name, trial, plan.spec.seeds[0], order).signature != other for order, other in recorded):
            return "whose runs have another configuration"
    return ""


def check_conditions(plan: TablePlan, row: TableRow, parallel: int) -> None:
    """Raises ConfigError if a reused row has other data than here, or further runs would be made in another way."""
    cfg = compose(row.name, plan.run(row.name, row.chosen, plan.spec.seeds[0]).words)
    try:
        components = Components.build(parse_config(cfg))
        config = components.config
        inputs = provenance.inputs(config, components.backbone, components.method)
        inputs["data"] = provenance.data_now(config, row.inputs.get("data", ""))
    except ClpetError as error:
        log.warning("%s: cannot check whether its data are those of the table: %s", row.name, error)
        return
    row.check_alike(inputs)
    if plan.further(row.name):
        threads = environments(cfg, parallel)[0].get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
        host: dict[str, Json] = {
            **components.host(),
            **({"threads": int(threads.partition(",")[0])} if threads else {}),
        }
        row.check_alike({**provenance.versions(), **host})
