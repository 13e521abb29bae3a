"""The experiment on one page: learn the tasks one after the other, evaluate every task after every task."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clpet.config.build import parse_config
from clpet.config.identity import setting, signature
from clpet.config.schema import Config
from clpet.data.benchmark import Benchmark
from clpet.errors import ConfigError, ModelError, enough_memory
from clpet.evaluation.data_inspection import cut_line
from clpet.evaluation.evaluator import Evaluator
from clpet.methods.base import Method
from clpet.methods.unused_options import unused_options
from clpet.metrics.transfer_matrix import TransferMatrix, on_split
from clpet.records import ExtendedFrom, Json, Results, State
from clpet.reporting import run_summary
from clpet.reporting.forecast import Forecast
from clpet.reporting.plots import method_figures, run_figures
from clpet.reporting.progress import Display
from clpet.runs import provenance, run_dir
from clpet.runs.carry_over import CarryOver
from clpet.runs.dry_run import count_parameters, dry_run
from clpet.runs.existing_run import show_existing
from clpet.runs.extension import Extension, find_extension
from clpet.runs.planning import measured_tasks, plan_work
from clpet.runs.prediction_files import write_predictions
from clpet.runs.row_measures import RowMeasures, check_measures
from clpet.runs.tracking import Tracker
from clpet.runs.tracking_options import Tracking
from clpet.runtime.atomic_io import RunLock
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState
from clpet.runtime.signals import GracefulShutdown
from clpet.training.trainer import quiet_libraries
from clpet.wiring import Components, Session

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path, overrides: list[str], quiet: bool = False) -> TransferMatrix | None:
    """Runs or resumes the experiment of `cfg` in the run directory `out`; a finished one is only shown.

    Returns its transfer matrix, None after a dry run. `overrides` are the words of the command line, for the record.
    With `quiet` nothing is printed but warnings.
    """
    config = parse_config(cfg)
    # The words give the same results without the run to extend, which may be gone when they are used again.
    overrides = [word for word in overrides if not word.lstrip("+").startswith("extend=")]
    console = Console(quiet=quiet or not get_world().is_main, force_jupyter=False)  # in a notebook plain text, too
    if not (config.fresh or config.dry_run) and (results := run_dir.finished_results(out)):
        return show_existing(console, config, out, results)
    components = Components.build(config)
    cast(Tracking, components.tracking).check()
    check_measures(components)
    with GracefulShutdown() as shutdown, RunLock(out), quiet_libraries():
        benchmark = load_benchmark(components, overrides)
        display = Display(console, len(benchmark))
        extension, line = find_extension(cfg, config, out, components, benchmark)
        if not config.dry_run:
            cache = Path(config.cache_dir) if config.cache_dir else None
            components = components.with_base_model(benchmark, cache, out, display)
        try:
            session = Session.assemble(components, benchmark, display, shutdown)
        except ModelError as error:
            if not (config.dry_run and components.backbone.config):
                raise
            count_parameters(console, components, benchmark, str(error))  # a dry run does not need the weights for this
            return None
        announce(display, session)
        if line:
            display.print(line)
        if config.dry_run:
            dry_run(console, session, out)
            return None
        return Experiment(cfg, overrides, session, out, display, extension).run(console)


def load_benchmark(components: Components, overrides: list[str]) -> Benchmark:
    """The benchmark, checked against the method and the objective. Raises ConfigError and DataError."""
    with get_world().main_first():
        benchmark = provenance.load_benchmark(components.config, components.source)
    # A length from the command line must fit the model; the default of a benchmark is shortened to fit.
    length_set = any(word.lstrip("+").startswith("benchmark.max_length=") for word in overrides)
    return components.settle(benchmark, length_set)


def announce(display: Display, session: Session) -> None:
    """Prints the method, the benchmark, resolved automatic options, truncated texts and warnings about the data."""
    method, benchmark = session.method, session.benchmark
    name, softmax = on_split(benchmark.name, session.split), run_dir.softmax(benchmark)
    num_labels, resolved = len(benchmark.labels), method.resolved(benchmark)
    display.print(run_summary.heading(method.name, name, len(benchmark), num_labels, softmax, resolved))
    for line in filter(None, (cut_line(session.data_record), session.probes.describe())):
        display.print(line)
    for warning in [*unused_options(method), *session.data_record["warnings"]]:
        log.warning(warning)
    display.tasks = len(method.curriculum())


@dataclass
class Experiment:
    """A run whose parts are all set up: learns the tasks, measures the matrix, and writes the run directory."""

    cfg: DictConfig
    overrides: list[str]
    session: Session
    out: Path
    display: Display
    extension: Extension | None = None  # tasks that another run has learned
    identity: dict[str, str] = field(init=False)
    tracker: Tracker = field(init=False)
    measures: RowMeasures = field(init=False)

    def __post_init__(self) -> None:
        self.identity = self.identify()
        config = cast(dict[str, Json], OmegaConf.to_container(self.cfg, resolve=True))
        tracking = cast(Tracking, self.session.components.tracking)
        self.measures = RowMeasures.of(self.session)
        self.tracker = Tracker(tracking, self.out, self.display, config, self.identity)

    def run(self, console: Console) -> TransferMatrix:
        """Learns all tasks, or those that an interrupted run has left, and writes and prints the results."""
        self.announce_work()
        checkpoint = self.start()
        with self.tracker:
            if get_world().is_main or get_world().mesh:  # ranks compute the norm of sharded gradients together
                self.session.trainer.step_log.subscribe(self.tracker.log_steps)
            with enough_memory(self.method.objective.memory_advice):
                state = self.learn(checkpoint)
            if not get_world().is_main:
                if get_world().mesh:  # all ranks gather the weights that the main rank writes
                    self.method.save(self.out / "adapters")
                return state.matrix
            results = self.finish(state)
        run_summary.show_finished(console, self.out, results, self.tracker.address)
        return state.matrix

    def identify(self) -> dict[str, str]:
        """Hashes of the configuration and of all inputs: a checkpoint is resumed only if it was made from the same."""
        identity = {"signature": signature(self.cfg), "setting": setting(self.cfg), "seed": str(self.config.seed)}
        with get_world().main_first():
            identity |= provenance.inputs(self.config, self.session.components.backbone, self.method)
        return identity | {"data": self.session.data_record["fingerprint"]}

    def start(self) -> tuple[RunState, State] | None:
        """Reads the newest checkpoint, None for a new run, and writes run.json."""
        checkpoint = None if self.config.fresh else RunState.resume(self.out / "state", self.identity)
        extended_from = checkpoint[0].extended_from if checkpoint else self.check_extension()
        get_world().barrier()  # all ranks have read the checkpoint before the main rank may delete it
        if get_world().is_main:
            if self.config.fresh:
                run_dir.clear(self.out)
            host, resumes = self.session.components.host(), checkpoint is not None
            data = self.session.data_record
            run_dir.start(
                self.out, self.cfg, self.overrides, self.identity, self.benchmark, data, host, resumes, extended_from
            )
        get_world().barrier()
        return checkpoint

    def check_extension(self) -> ExtendedFrom | None:
        """The record of the extension, checked against this session. One that was found but does not fit is dropped."""
        if self.extension is None:
            return None
        try:
            self.extension.check(self.session, self.identity)
        except ConfigError as error:
            if self.extension.explicit:
                raise
            self.display.print(f"note: {error}")
            self.extension = None
            return None
        return self.extension.record()

    def learn(self, checkpoint: tuple[RunState, State] | None) -> RunState:
        """Learns the tasks one after the other, and evaluates and saves after each of them.

        The trainer also saves inside long tasks; a killed run resumes from its newest checkpoint.
        """
        method, display, trainer, curriculum = self.method, self.display, self.session.trainer, self.method.curriculum()
        folder, checkpointer, state = self.out / "state", trainer.checkpointer, self.resume(checkpoint)
        for position, (index, task) in enumerate(curriculum):
            if position < state.done:
                continue
            display.task(position + 1, task.name)
            trainer.step_log.start_task(position + 1, task.name, sum(cost.get("steps", 0) for cost in state.costs))
            checkpointer.start_task(state.task, state.task_writer(folder, self.identity))
            self.session.learn(index, last=position + 1 == len(curriculum))
            state.costs.append(run_dir.task_cost(method))
            state.done, state.task, state.trainer = position + 1, None, trainer.state()
            self.evaluate(state, index + 1)
            with checkpointer.task_boundary():
                every = self.config.train.snapshot_every
                if every and (position + 1) % every == 0:
                    run_dir.save_snapshot(self.out, index + 1, method, state.trainer)
                state.save(folder, method.state_dict(), self.identity)
            display.task_done()
        return state

    def resume(self, checkpoint: tuple[RunState, State] | None) -> RunState:
        """The state of a checkpoint, loaded into method and trainer; without one a new state with row 0 measured."""
        if checkpoint is None:
            names, direction = self.benchmark.names, self.benchmark.direction
            state = RunState(TransferMatrix(names, direction), TransferMatrix(names, direction))
            self.tracker.begin(None)
            if self.extension:
                self.extend(state, self.extension)
            else:
                self.evaluate(state, 0)
            return state
        state, method_state = checkpoint
        if method_state:
            self.method.load_state_dict(method_state)
        self.session.trainer.load(state.trainer)
        self.tracker.begin(state)
        inside = f", inside task {state.done + 1}" if state.task else ""
        self.display.print(f"resuming after {state.done} of {len(self.method.curriculum())} tasks{inside}")
        return state

    def extend(self, state: RunState, extension: Extension) -> None:
        """Takes over the first tasks from another run: their weights, costs and steps, and their rows of the matrix.

        A row whose cells that run has measured is copied, every other one is measured with the weights of that time.
        """
        source, method, trainer = CarryOver(extension.base, self.benchmark.names), self.method, self.session.trainer
        state.extended_from = extension.record()
        for row in range(extension.learned + 1):
            if row and (row == extension.learned or row not in extension.copied):
                trainer.load(extension.load(row, method))
            tasks = self.measured_tasks(row)
            if row:
                state.done = row
                state.costs.append(source.cost(row, evaluated=len(tasks) > 0))
                if get_world().is_main and self.config.train.log_every:
                    self.tracker.log_steps(source.steps(row))
            if row in extension.copied:
                self.copy_row(source, state, row, tasks)
            else:
                method.objective.meter.restart()
                self.evaluate(state, row, source.diagnostics(row))
            every = self.config.train.snapshot_every
            if every and row and row % every == 0 and not source.copy_snapshot(self.out, row):
                run_dir.save_snapshot(self.out, row, method, trainer.state())
        state.trainer = trainer.state()
        state.save(self.out / "state", method.state_dict(), self.identity)

    def copy_row(self, source: CarryOver, state: RunState, row: int, tasks: range) -> None:
        """Copies a row of the matrix from another run, with its predictions."""
        if not tasks:
            return
        source.copy_row(state, row, tasks)
        if get_world().is_main:
            if self.config.evaluation.predictions:
                source.copy_predictions(self.out, row, tasks, self.benchmark.labels)
            if line := source.line(state, row, tasks):
                self.tracker.log_line(line)

    def measured_tasks(self, row: int) -> range:
        """The cells of row `row` of the matrix that evaluation.matrix and evaluation.every select."""
        return measured_tasks(self.config.evaluation, self.method, len(self.benchmark), row)

    def evaluated_tokens(self, row: int) -> float:
        """Tokens that are read to measure row `row` of the matrix."""
        pool = self.session.data.split(self.session.split)
        return float(pool.lengths[pool.rows_of(*self.measured_tasks(row))].sum())

    def announce_work(self) -> None:
        """Plans the steps of the run, from which the time left is predicted, and prints what the run will work with."""
        train = self.session.config.train
        works, steps = plan_work(self.method, train.epochs_of, self.evaluated_tokens)
        self.display.forecast = Forecast(works)
        adapters, hardware = self.method.objective.adapters, self.session.components.hardware
        trained = sum(value.numel() for value in adapters.model.parameters() if value.requires_grad)
        sizes = run_summary.sizes(self.session.data_record)
        model = run_summary.model_line(str(self.cfg.model.name), adapters.base_parameters, trained, hardware.record())
        work = run_summary.work_line(steps, train.global_batch_size)
        for line in (sizes, model, work, f"run    {self.out}"):
            self.display.print(line)

    def evaluate(self, state: RunState, row: int, recorded: dict[str, float] | None = None) -> None:
        """Measures row `row` of the matrix; `recorded` are its diagnostics of an earlier run."""
        tasks = self.measured_tasks(row)
        if not tasks:
            return
        with self.display.evaluating(self.evaluated_tokens(row)):
            if row == len(self.benchmark):
                # Before the last row: methods keep the statistics of their latest evaluation, which must be this row's.
                state.validation = self.validate(tasks)
            further = self.measures.measure(row, state.diagnostics)  # also before it
            evaluation = Evaluator(self.benchmark, self.session.data, self.session.split)(self.method, row, list(tasks))
        evaluation.diagnostics = {**(recorded or {}), **evaluation.diagnostics, **self.method.diagnostics(), **further}
        for matrix, scores in ((state.matrix, evaluation.seen), (state.task_matrix, evaluation.per_task)):
            for index in tasks:
                matrix.record(row, index, scores[index].value, scores[index].correct, scores[index].total)
        state.diagnostics.append({"row": row, **evaluation.diagnostics})
        if state.costs:
            state.costs[-1] = {**state.costs[-1], **self.method.objective.meter.take_evaluation()}
        if self.config.evaluation.predictions and get_world().is_main:
            names, labels = self.benchmark.names, self.benchmark.labels
            texts = self.benchmark.texts(self.session.split) if self.config.evaluation.keep_text else None
            write_predictions(self.out / "predictions", row, evaluation, names, labels, texts)
        self.tracker.log_row(state, row, evaluation)

    def validate(self, tasks: range) -> dict[str, float] | None:
        """Validation averages after the last task, by which settings are chosen; None unless all tasks have them."""
        enabled = self.config.evaluation.validation and self.session.split == "test"
        if not enabled or len(tasks) < len(self.benchmark) or not all(task.validation for task in self.benchmark.tasks):
            return None
        evaluation = Evaluator(self.benchmark, self.session.data, "validation")(
            self.method, len(self.benchmark), list(tasks)
        )
        views = {"average": evaluation.seen, "own_average": evaluation.per_task}
        return {name: sum(view[index].value for index in tasks) / len(tasks) for name, view in views.items()}

    def finish(self, state: RunState) -> Results:
        """Writes weights, figures and results.json, on the main rank only; returns the results."""
        out, method = self.out, self.method
        data = self.session.data_record
        results = run_dir.collect(out, self.cfg, self.overrides, self.identity, method, self.benchmark, data, state)
        title = f"{method.name} on {on_split(self.benchmark.name, results['split'])}"
        figures = run_figures.draw(out, state.matrix, title, data.get("order"), state.diagnostics)
        figures += method_figures.draw(out, method.name, method.figures())
        self.tracker.log_results(results, figures)
        run_dir.finish(out, results)
        self.tracker.upload()
        return results

    @property
    def config(self) -> Config:
        """The checked configuration."""
        return self.session.config

    @property
    def method(self) -> Method:
        """The method."""
        return self.session.method

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return self.session.benchmark
