"""`clpet eval`: what a run was measured on once more with its weights, or tasks of lm-evaluation-harness."""

from clpet.errors import DataError, enough_memory
from clpet.evaluation.evaluator import Evaluator
from clpet.metrics.transfer_matrix import on_split
from clpet.reporting.tables import perplexity, table
from clpet.runs.load_run import Reopened


def again(run: Reopened) -> tuple[str, bool]:
    """(the row measured anew beside what was recorded, whether they are equal); every task where none was recorded."""
    measured = [index for index, score in enumerate(run.scores) if score is not None]
    tasks = measured or list(run.method.measured(run.row, range(len(run.benchmark))))
    if not tasks:
        raise DataError(f"method={run.method.name} has no model to test after {run.row} tasks")
    with enough_memory(run.method.objective.memory_advice):
        found = Evaluator(run.benchmark, run.data, run.split)(run.method, run.row, tasks)
    spell = perplexity if run.benchmark.direction == "lower" else _percent
    rows = [
        [run.benchmark.names[index], spell(run.scores[index]), spell(found.seen[index].value),
         _verdict(run.scores[index], found.seen[index].value)]
        for index in tasks
    ]  # fmt: skip
    equal = all(run.scores[index] in (None, found.seen[index].value) for index in tasks)
    name = on_split(run.benchmark.name, run.split)
    head = f"{run.method.name} on {name} after {run.row} of {len(run.benchmark)} tasks"
    return f"{head}\n{table(['task', 'recorded', 'now', ''], rows)}", equal


def _verdict(recorded: float | None, now: float) -> str:
    if recorded is None:
        return "not recorded"
    return "equal" if recorded == now else f"differs by {now - recorded:+.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
