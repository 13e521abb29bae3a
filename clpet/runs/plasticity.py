"""Plasticity (evaluation.probes=[plasticity]): how well the method learns one fixed task from where it is now.

After k tasks, a second session gets the state of the run and learns the probe task as its task k + 1: with the method's
own parameters, loss and stages, a new branch where the method has one per task, a new optimiser, and the epochs and
learning rate of the first task. The session is then thrown away, and random states are put back. `plasticity` is the
score of the probe task among its own labels, `plasticity_relative` that score divided by the one in row 0, and
`plasticity_loss` the area under the loss curve: the mean over all steps of the last fit. The batches of the probe task
are drawn with the same seeds in every row.
"""

import contextlib
import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from clpet.config.build import build
from clpet.config.schema import OptimizerState, Probe, Select
from clpet.data.benchmark import Benchmark, Task
from clpet.errors import ConfigError, DataError
from clpet.escape import safe_name
from clpet.evaluation.evaluator import Evaluator
from clpet.evaluation.outside_tasks import OutsideTasks
from clpet.records import Metrics
from clpet.training.fit_checkpoint import random_state, set_random_state
from clpet.training.progress import NoProgress
from clpet.wiring import Components, Session

SCORE, RELATIVE, LOSS = "probe/plasticity", "probe/plasticity_relative", "probe/plasticity_loss"


def check_plasticity(components: Components) -> None:
    """Raises ConfigError for an unknown probe task, and for a method that trains nothing. Loads nothing."""
    if Probe.plasticity not in components.config.evaluation.probes:
        return
    if not components.method.trains:
        raise ConfigError(f"evaluation.probes=plasticity: method={components.method.name} trains nothing")
    probe_source(components)


def probe_source(components: Components) -> OutsideTasks:
    """The source of the probe task. Raises ConfigError."""
    config, option = components.config, "evaluation.probe_task"
    words = [f"benchmark.max_train={config.evaluation.probe_examples or 'null'}"]
    return OutsideTasks.find(str(config.evaluation.probe_task), option, config, components.objective, *words)


class LossCurve(NoProgress):
    """Collects the losses of the last fit."""

    def __init__(self) -> None:
        self.epochs: dict[int, tuple[int, Tensor]] = {}  # steps of an epoch, and the mean of their losses

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        self.epochs = {}

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        self.epochs[epoch] = step, loss

    def area(self) -> float:
        """The mean loss of all steps."""
        steps = sum(step for step, _ in self.epochs.values())
        return sum(step * float(mean) for step, mean in self.epochs.values()) / steps


@dataclass(frozen=True)
class ProbedBenchmark(Benchmark):
    """A benchmark with a probe task, number `probe`, which has the same random streams wherever it comes."""

    probe: int = 0

    def seed_key(self, index: int) -> int | str:
        return "probe" if index == self.probe else super().seed_key(index)


@dataclass
class Plasticity:
    """Measures the probe of a run; `task` is None without one."""

    session: Session
    task: Task | None

    @classmethod
    def of(cls, session: Session) -> "Plasticity":
        """That of a session. Raises ConfigError and DataError for a task that cannot be learned, before training."""
        if Probe.plasticity not in session.config.evaluation.probes:
            return cls(session, None)
        outside = probe_source(session.components).load(session.config.data_dir)
        plasticity = cls(session, outside.tasks[0])
        plasticity.check(outside)
        return plasticity

    def check(self, outside: Benchmark) -> None:
        """Raises ConfigError and DataError if the probe task is not a further task for every state of the run."""
        benchmark, method, task = self.session.benchmark, self.session.method, outside.tasks[0]
        fingerprints = [Benchmark.task_fingerprint(learned) for learned in benchmark.tasks]
        if len(outside) > 1:
            names = ", ".join(map(safe_name, outside.names))
            raise ConfigError(
                f"evaluation.probe_task names {len(outside)} tasks: add one of them after a colon ({names})"
            )
        if task.name in benchmark.names or Benchmark.task_fingerprint(task) in fingerprints:
            raise ConfigError(
                f"evaluation.probe_task: the run learns {safe_name(task.name)} itself, choose another task"
            )
        if outside.template != benchmark.template or outside.chat != benchmark.chat:
            raise DataError(f"evaluation.probe_task: {outside.name} has another template than {benchmark.name}")
        tied = [
            method.tied_to_later_tasks(row + 1, len(benchmark), len(benchmark) + 1) for row in range(len(benchmark))
        ]
        if reason := next(filter(None, tied), ""):
            raise ConfigError(f"evaluation.probes=plasticity: method={method.name}: {reason}")
        for row in range(len(benchmark) + 1):
            method.check_benchmark(self.benchmark(row))

    def benchmark(self, row: int) -> Benchmark:
        """The run's tasks, with the probe task after the first `row` of them."""
        assert self.task is not None
        run = self.session.benchmark
        values = {item.name: getattr(run, item.name) for item in fields(run)}
        tasks = [*run.tasks[:row], self.task, *run.tasks[row:]]
        return ProbedBenchmark(**{**values, "tasks": tasks, "probe": row})

    def measure(self, row: int, earlier: Sequence[Metrics]) -> dict[str, float]:
        """The values after `row` tasks; `earlier` are the diagnostics of the rows before. All ranks take part."""
        if self.task is None:
            return {}
        device = self.session.method.objective.device
        state = random_state(device)
        try:
            values = self._learn(row)
        finally:
            set_random_state(state, device)
            gc.collect()  # the second network
        first = values if row == 0 else next((line for line in earlier if line["row"] == 0), {})
        start = first.get(SCORE)
        return values | ({RELATIVE: values[SCORE] / start} if start else {})

    def _learn(self, row: int) -> dict[str, float]:
        curve = LossCurve()
        session = self._second_session(row, curve)
        session.method.load_state_dict(self.session.method.state_dict())
        session.learn(row)
        if not curve.epochs:
            name = session.method.name
            raise ConfigError(f"evaluation.probes=plasticity: method={name} makes no fit whose loss is measured")
        evaluation = Evaluator(session.benchmark, session.data, session.split)(session.method, row + 1, [row])
        return {SCORE: evaluation.per_task[row].value, LOSS: curve.area()}

    def _second_session(self, row: int, curve: LossCurve) -> Session:
        """A session like that of the run, before its first task, for `benchmark(row)`."""
        components, config = self.session.components, self.session.config
        train = replace(
            config.train, epochs=config.train.epochs_of(0), lr=config.train.lr_of(0), select=Select.last,
            optimizer_state=OptimizerState.reset, log_every=0,
        )  # fmt: skip
        second = replace(
            components, config=replace(config, train=train),
            method=build(config.method, "method", cache_dir=config.cache_dir), replay=build(config.replay, "replay"),
        )  # fmt: skip
        with _repeated_warnings_hidden():
            return Session.assemble(second, second.settle(self.benchmark(row)), curve)


@contextlib.contextmanager
def _repeated_warnings_hidden() -> Iterator[None]:
    """Hides the warnings that the run has given when it was set up."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
