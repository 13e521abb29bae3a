"""Carries what a finished run has measured and written over to a run that extends it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Checkpoint, Cost, Json, ProgressLine
from clpet.reporting.step_lines import StepLine, read_steps
from clpet.runs import line_files
from clpet.runs.run_dir import snapshot_folder
from clpet.runtime.atomic_io import atomic_file, replace_folder
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState, checkpoints, read_tree
from clpet.runtime.untrusted_json import as_data_error

EVALUATION_COSTS = ("evaluation_seconds", "evaluated_examples", "evaluation_memory_mb")


class CarryOver:
    """The records of the run `base`. Raises DataError if its last checkpoint cannot be read.

    `names` are the tasks of the run that extends it, of which the first ones are also the first ones of `base`.
    """

    def __init__(self, base: Path, names: Sequence[str]) -> None:
        self.base, self.names = base, names
        with as_data_error(f"the state of {base} cannot be read"):
            newest = [folder for folder in checkpoints(base / "state") if folder.name.isdigit()][-1]
            measured = cast(Checkpoint, read_tree(newest))
            self.matrices = TransferMatrix.from_json(measured["matrix"]), TransferMatrix.from_json(measured["own"])
            self.costs, self.rows = measured["costs"], {row["row"]: row for row in measured["diagnostics"]}
        self.tasks = self.matrices[0].tasks

    def cost(self, row: int, evaluated: bool) -> Cost:
        """The cost of learning task number `row`; without that of its evaluation unless the row is `evaluated`."""
        with as_data_error(f"the state of {self.base} has no cost of task {row}"):
            cost = dict(self.costs[row - 1])
        return cast(Cost, {key: value for key, value in cost.items() if evaluated or key not in EVALUATION_COSTS})

    def diagnostics(self, row: int) -> dict[str, float]:
        """Metrics recorded with a row, without those of tasks that the extended run does not have."""
        dropped = {f"/{name}" for name in set(self.tasks).difference(self.names)}
        values = {key: value for key, value in self.rows.get(row, {}).items() if key != "row" and value is not None}
        return {key: value for key, value in values.items() if not key.endswith(tuple(dropped))}

    def steps(self, row: int) -> list[StepLine]:
        """The step log of task number `row`."""
        return [line for line in read_steps(self.base) if line.get("task") == row]

    def copy_row(self, state: RunState, row: int, tasks: range) -> None:
        """Copies the cells `tasks` of a row of both matrices, and its diagnostics."""
        for matrix, before in zip((state.matrix, state.task_matrix), self.matrices, strict=True):
            for index in tasks:
                values = (float(cells[row, index]) for cells in (before.scores, before.correct, before.total))
                matrix.record(row, index, *values)
        state.diagnostics.append({"row": row, **self.diagnostics(row)})

    def line(self, state: RunState, row: int, tasks: range) -> ProgressLine | None:
        """The line of metrics.jsonl about a row, with the tasks that the extended run measures in it."""
        lines = [cast(dict[str, Json], line) for line in line_files.read(self.base / line_files.METRICS)]
        recorded = next((line for line in reversed(lines) if isinstance(line, dict) and line.get("row") == row), None)
        if recorded is None:
            return None
        names = [self.names[index] for index in tasks]
        scores = {name: score for name, score in cast(dict[str, Json], recorded["tasks"]).items() if name in names}
        figures = {key: value for key, value in recorded.items() if key == "row" or key not in self.rows.get(row, {})}
        line = {**figures, **self.diagnostics(row), "tasks": scores}
        if row:
            line |= {"average": state.matrix.average(row, row), "whole": state.matrix.micro_average(row, row)}
            line["cost"] = cast(Json, state.costs[-1])
        return cast(ProgressLine, line)

    def copy_predictions(self, out: Path, row: int, tasks: range, labels: Sequence[str]) -> None:
        """Copies the predictions of a row for the test examples of `tasks`, with the names of all tasks and labels."""
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        file = Path("predictions", f"after-{row:03d}.parquet")
        if not (self.base / file).is_file():
            return
        table = pyarrow.parquet.read_table(self.base / file)
        names = [self.names[index] for index in tasks]
        table = table.filter(pyarrow.compute.is_in(table["task"].cast(pyarrow.string()), pyarrow.array(names)))
        for index, name in enumerate(table.column_names):
            if pyarrow.types.is_dictionary(table[name].type):
                words = self.names if name in ("task", "selected") else labels
                values = pyarrow.compute.index_in(table[name].cast(pyarrow.string()), pyarrow.array(words))
                column = pyarrow.DictionaryArray.from_arrays(values.combine_chunks(), words)
                table = table.set_column(index, name, column)
        (out / "predictions").mkdir(exist_ok=True)
        with atomic_file(out / file) as temporary:
            pyarrow.parquet.write_table(table.replace_schema_metadata(), temporary, compression="zstd")

    def copy_snapshot(self, out: Path, row: int) -> bool:
        """Copies the weights after `row` tasks; False if the run has kept no snapshot of them."""
        source = snapshot_folder(self.base, row)
        if not (source / "state").is_dir():
            return False
        if not get_world().is_main:
            return True
        with replace_folder(snapshot_folder(out, row)) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=_links)
        return True


def _links(folder: str, names: list[str]) -> list[str]:
    """Those of a folder's names that are links: a run from elsewhere could copy any file with them."""
    return [name for name in names if Path(folder, name).is_symlink()]
