"""General ability inside a run (evaluation.downstream): tasks of lm-evaluation-harness in rows of the matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clpet.config.schema import EvaluationOptions, Matrix
from clpet.errors import ConfigError, enough_memory
from clpet.methods.base import Method
from clpet.runs import lm_eval
from clpet.runtime.distributed import get_world
from clpet.training.fit_checkpoint import random_state, set_random_state
from clpet.wiring import Components, Session


def check_downstream(components: Components) -> None:
    """Raises ConfigError where evaluation.downstream cannot be measured, before anything is loaded."""
    options = components.config.evaluation
    if not options.downstream:
        return
    lm_eval.check(components.objective, components.backbone, components.method, "evaluation.downstream")
    if components.config.evaluation.matrix is Matrix.last and options.downstream_every != 1:
        raise ConfigError(
            "evaluation.downstream_every has no effect with evaluation.matrix=last, which measures the last row alone"
        )
    if components.hardware.shard:
        raise ConfigError("evaluation.downstream cannot be used with hardware.shard: one rank reads the whole model")


@dataclass
class Downstream:
    """Measures the tasks in every evaluation.downstream_every-th measured row, and in the first and the last one."""

    options: EvaluationOptions
    method: Method
    num_tasks: int
    tasks: lm_eval.Harness  # the tasks of the harness, with their data; empty on all ranks but the main one

    @classmethod
    def of(cls, session: Session) -> "Downstream":
        """That of a session. Raises ConfigError and DataError for tasks that cannot be loaded, before training."""
        options, tasks = session.config.evaluation, lm_eval.Harness()
        if options.downstream and get_world().is_main:
            lm_eval.silence_logs()
            folder = Path(options.downstream_dir).expanduser() if options.downstream_dir else None
            tasks = lm_eval.load_tasks(options.downstream, folder)
        return cls(options, session.method, len(session.benchmark), tasks)

    def measure(self, row: int) -> dict[str, float]:
        """{downstream/TASK/METRIC: value} after `row` tasks, in the harness's units; empty in other rows."""
        due = row % self.options.downstream_every == 0 or row == self.num_tasks
        if not (self.options.downstream and due):
            return {}
        with get_world().wait_for_main():
            return self._measure() if get_world().is_main else {}

    def _measure(self) -> dict[str, float]:
        objective = self.method.objective
        state = random_state(objective.device)  # the harness draws random numbers
        try:
            with enough_memory(objective.memory_advice):
                results = lm_eval.measure(self.method, objective.causal, self.tasks, self.options.downstream_limit)
        finally:
            set_random_state(state, objective.device)
        return scores(results)


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
