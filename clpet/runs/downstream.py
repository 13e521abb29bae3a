"""General ability inside a run (evaluation.downstream): tasks that are not learned, in rows of the matrix.

They are tasks of lm-evaluation-harness, or of the benchmarks of clpet, `benchmark/NAME`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clpet.config.schema import EvaluationOptions, Matrix
from clpet.errors import ConfigError, enough_memory
from clpet.evaluation.outside_scores import OutsideScore
from clpet.evaluation.outside_tasks import PREFIX, OutsideTasks
from clpet.methods.base import Method
from clpet.runs import lm_eval
from clpet.runtime.distributed import get_world
from clpet.training.fit_checkpoint import random_state, set_random_state
from clpet.wiring import Components, Session


def check_downstream(components: Components) -> None:
    """Raises ConfigError where evaluation.downstream cannot be measured, before anything is loaded."""
    options, method = components.config.evaluation, components.method
    if not options.downstream:
        return
    if harness_tasks(options):
        lm_eval.check(components.objective, components.backbone, method, "evaluation.downstream")
    elif options.downstream_dir:
        raise ConfigError("evaluation.downstream_dir is for tasks of lm-evaluation-harness")
    outside = outside_tasks(components)
    if outside and method.task_id_at_test:
        raise ConfigError(
            f"evaluation.downstream={PREFIX}{outside[0].source.name}: method={method.name} answers only where the task "
            "is given, which is one that it has learned"
        )
    if options.matrix is Matrix.last and options.downstream_every != 1:
        raise ConfigError(
            "evaluation.downstream_every has no effect with evaluation.matrix=last, which measures the last row alone"
        )
    if components.hardware.shard:
        raise ConfigError("evaluation.downstream cannot be used with hardware.shard: one rank reads the whole model")


def harness_tasks(options: EvaluationOptions) -> list[str]:
    """The tasks of lm-evaluation-harness among evaluation.downstream."""
    return [name for name in options.downstream if not name.startswith(PREFIX)]


def outside_tasks(components: Components) -> list[OutsideTasks]:
    """The benchmarks of clpet among evaluation.downstream. Raises ConfigError."""
    config, option = components.config, "evaluation.downstream"
    words = [word for word in config.evaluation.downstream if word.startswith(PREFIX)]
    return [OutsideTasks.find(word, option, config, components.objective) for word in words]


@dataclass
class Downstream:
    """Measures the tasks in every evaluation.downstream_every-th measured row, and in the first and the last one."""

    options: EvaluationOptions
    method: Method
    num_tasks: int
    tasks: lm_eval.Harness  # the tasks of the harness, with their data; empty on all ranks but the main one
    outside: list[OutsideScore]

    @classmethod
    def of(cls, session: Session) -> "Downstream":
        """That of a session. Raises ConfigError and DataError for tasks that cannot be loaded, before training."""
        options, tasks = session.config.evaluation, lm_eval.Harness()
        if (names := harness_tasks(options)) and get_world().is_main:
            lm_eval.silence_logs()
            folder = Path(options.downstream_dir).expanduser() if options.downstream_dir else None
            tasks = lm_eval.load_tasks(names, folder)
        objective, limit = session.method.objective, options.downstream_limit
        with get_world().main_first():
            benchmarks = [tasks.load(session.config.data_dir) for tasks in outside_tasks(session.components)]
        outside = [
            OutsideScore.of(objective, benchmark, task, options.split, limit)
            for benchmark in benchmarks
            for task in benchmark.tasks
        ]
        return cls(options, session.method, len(session.benchmark), tasks, outside)

    def measure(self, row: int) -> dict[str, float]:
        """{downstream/TASK/METRIC: value} after `row` tasks, in the units of each; empty in other rows."""
        due = row % self.options.downstream_every == 0 or row == self.num_tasks
        if not (self.options.downstream and due):
            return {}
        objective, values = self.method.objective, dict[str, float]()
        state = random_state(objective.device)  # the harness draws random numbers
        try:
            with enough_memory(objective.memory_advice):
                if harness_tasks(self.options):
                    with get_world().wait_for_main():
                        values |= self._measure_harness() if get_world().is_main else {}
                for score in self.outside:
                    values[f"downstream/{score.name}/{score.metric}"] = score.measure(self.method, row)
        finally:
            set_random_state(state, objective.device)
        return values

    def _measure_harness(self) -> dict[str, float]:
        causal, limit = self.method.objective.causal, self.options.downstream_limit
        return scores(lm_eval.measure(self.method, causal, self.tasks, limit))


def scores(results: lm_eval.Harness) -> dict[str, float]:
    """The numbers of the harness by task and metric, without standard errors, and clpet's normalised accuracy."""
    values: dict[str, float] = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                values[f"downstream/{task}/{name}"] = float(value)
    above_chance: Mapping[str, Mapping[str, float]] = results.get(lm_eval.NORMALISED, {})
    return values | {f"downstream/{task}/normalised": value["normalised"] for task, value in above_chance.items()}
