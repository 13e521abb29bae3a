"""`clpet eval`: measures a run's weights once more and compares the scores with the recorded ones."""

from clpet.errors import DataError, enough_memory
from clpet.evaluation.evaluator import Evaluator
from clpet.metrics.transfer_matrix import on_split
from clpet.reporting.tables import spell_score, table
from clpet.runs.load_run import LoadedRun


def compare_with_recorded(run: LoadedRun) -> tuple[str, bool]:
    """(table of recorded and new scores, whether they are equal).

    Measures the tasks that have a recorded score in this row, or all tasks if none has. Raises DataError.
    """
    recorded = [index for index, score in enumerate(run.scores) if score is not None]
    tasks = recorded or list(run.method.evaluable_tasks(run.row, range(len(run.benchmark))))
    if not tasks:
        raise DataError(f"method={run.method.name} has no model to evaluate after {run.row} tasks")
    with enough_memory(run.method.objective.memory_advice):
        scores = Evaluator(run.benchmark, run.data, run.split)(run.method, run.row, tasks).seen
    direction = run.benchmark.direction
    rows = [
        [
            run.benchmark.names[index],
            spell_score(run.scores[index], direction),
            spell_score(scores[index].value, direction),
            _verdict(run.scores[index], scores[index].value),
        ]
        for index in tasks
    ]
    # Equality is exact on purpose: loading the same weights must give the same bits on the same machine.
    equal = all(run.scores[index] in (None, scores[index].value) for index in tasks)
    name = on_split(run.benchmark.name, run.split)
    head = f"{run.method.name} on {name} after {run.row} of {len(run.benchmark)} tasks"
    return f"{head}\n{table(['task', 'recorded', 'now', ''], rows)}", equal


def _verdict(recorded: float | None, now: float) -> str:
    if recorded is None:
        return "not recorded"
    return "equal" if recorded == now else f"differs by {now - recorded:+.3g}"
