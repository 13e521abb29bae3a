"""The experiment on one page: learn the tasks one after the other, evaluate every task after every task."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clpet import base_model
from clpet.config.build import parse_config
from clpet.config.identity import setting, signature
from clpet.config.schema import Config, Matrix
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.errors import ModelError, enough_memory
from clpet.evaluation.data_inspection import cut_line, inspect_data
from clpet.evaluation.evaluator import Evaluator
from clpet.methods.base import Method
from clpet.metrics.transfer_matrix import TransferMatrix, on_split
from clpet.models.memory_saving import shard
from clpet.objectives import load as load_objective_class
from clpet.reporting import run_summary
from clpet.reporting.plots import method_figures, run_figures
from clpet.reporting.progress import Display
from clpet.runs import provenance, run_dir
from clpet.runs.dry_run import count_parameters, dry_run
from clpet.runs.tracking import Tracker, write_predictions
from clpet.runtime.atomic_io import RunLock
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState
from clpet.runtime.signals import GracefulShutdown
from clpet.runtime.untrusted_json import as_data_error
from clpet.session import assemble, check_validation, load_objective
from clpet.training.fit_checkpoint import FitCheckpointer
from clpet.training.trainer import Trainer, quiet_libraries

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path, overrides: list[str]) -> TransferMatrix | None:
    """Runs, resumes or, if it is finished, just shows the experiment that `cfg` describes, in the folder `out`."""
    config = parse_config(cfg)
    console = Console(quiet=not get_world().is_main)
    identity = {"signature": signature(cfg), "setting": setting(cfg), "seed": str(config.seed)}
    if not (config.fresh or config.dry_run) and (done := run_dir.finished_results(out)):
        with as_data_error(f"{out / 'results.json'} is not the result of a run"):
            provenance.check_finished(out, done, config)
            run_summary.show_finished(console, out, done)
        console.print("shown, not run again: it was finished before (fresh=true starts over)")
        return TransferMatrix.from_json(done)
    method, parts = assemble(config)
    with GracefulShutdown() as shutdown, RunLock(out), quiet_libraries():
        with get_world().main_first():
            benchmark: Benchmark = provenance.load_benchmark(config, parts["benchmark"])
        benchmark.length_set = any(word.lstrip("+").startswith("benchmark.max_length=") for word in overrides)
        method.check_benchmark(benchmark)
        load_objective_class(parts["benchmark"].objective.value).check_benchmark(benchmark, config.evaluation)
        check_validation(config, method, benchmark)
        display = Display(console, len(benchmark))
        if not config.dry_run:
            cache = Path(config.cache_dir) if config.cache_dir else None
            base_model.prepare(parts["model"], benchmark, parts["hardware"], cache, out, display)
        try:
            with get_world().main_first():
                objective, data = load_objective(config, parts, benchmark)
        except ModelError as error:
            if not (config.dry_run and parts["model"].config):
                raise
            count_parameters(console, parts, benchmark, str(error))
            return None
        if parts["hardware"].shard and get_world().size > 1:
            shard(objective.adapters.model, objective.device)
        benchmark.data_record = inspect_data(benchmark, data)
        announce(display, method, benchmark, parts["benchmark"].objective.value, config.evaluation.split.value)
        parts["replay"].setup(data, config.seed, config.train.global_batch_size)
        method.setup(objective, benchmark, data, parts["replay"], config.seed)
        display.tasks = len(method.curriculum())
        trainer = Trainer(config.train, parts["hardware"], objective, display, config.seed)
        trainer.checkpointer = FitCheckpointer(method, config.train.save_minutes, shutdown)
        if config.dry_run:
            dry_run(console, config, method, benchmark, trainer)
            return None
        with get_world().main_first():
            identity |= provenance.inputs(config, parts["model"], method)
        identity["data"] = benchmark.data_record["fingerprint"]
        saved = None if config.fresh else RunState.resume(out / "state", identity)
        get_world().barrier()
        if get_world().is_main:
            if config.fresh:
                run_dir.clear(out)
            host = parts["hardware"].record()
            run_dir.start(out, cfg, overrides, identity, benchmark, host, resumes=saved is not None)
        get_world().barrier()
        with Tracker(parts["tracking"], out, display, _plain(cfg), identity) as track:
            with enough_memory(objective.memory_advice):
                state = Experiment(config, out, identity, method, benchmark, data, trainer, track, saved).learn()
            if not get_world().is_main:
                return state.matrix
            results = run_dir.collect(out, cfg, overrides, identity, method, benchmark, state)
            title = f"{method.name} on {on_split(benchmark.name, results['split'])}"
            paths = run_figures.draw(out, state.matrix, title, benchmark.data_record.get("order"))
            track.log_results(results, [*paths, *method_figures.draw(out, method.name, method.figures())])
            run_dir.finish(out, results)
        run_summary.show_finished(console, out, results)
    return state.matrix


@dataclass
class Experiment:
    """Everything the loop works with."""

    config: Config
    out: Path
    identity: dict[str, str]
    method: Method
    benchmark: Benchmark
    data: Encoded
    trainer: Trainer
    track: Tracker
    saved: tuple[RunState, dict[str, Any]] | None  # what an earlier process left

    def learn(self) -> RunState:
        """The loop. Checkpoints follow every task and lie inside long ones; a killed run goes on after the last one."""
        method, track, trainer, curriculum = self.method, self.track, self.trainer, self.method.curriculum()
        folder, checkpointer, state = self.out / "state", trainer.checkpointer, self.resume()
        for position, (index, task) in enumerate(curriculum):
            if position < state.done:
                continue
            track.display.task(position + 1, task.name)
            trainer.begin_task(index, last=position + 1 == len(curriculum))
            checkpointer.start_task(state.task, state.task_writer(folder, self.identity))
            method.learn(task, index, trainer)
            method.after_task(task, index)
            state.costs.append(run_dir.task_cost(method))
            state.done, state.task, state.trainer = position + 1, None, trainer.state()
            self.evaluate(state, index + 1)
            with checkpointer.task_boundary():
                every = self.config.train.snapshot_every
                if every and (position + 1) % every == 0 and get_world().is_main:
                    run_dir.save_snapshot(self.out, index + 1, method)
                state.save(folder, method.state_dict(), self.identity)
            track.display.task_done()
        return state

    def resume(self) -> RunState:
        """The state after the last finished task, or a new one with row 0 measured."""
        saved, self.saved = self.saved, None
        if saved is None:
            names, direction = self.benchmark.names, self.benchmark.direction
            state = RunState(TransferMatrix(names, direction), TransferMatrix(names, direction))
            self.track.drop_lines_after(-1)
            self.evaluate(state, 0)
            return state
        state, method_state = saved
        if method_state:
            self.method.load_state_dict(method_state)
        self.trainer.load(state.trainer)
        self.track.drop_lines_after(state.done)
        inside = f", inside task {state.done + 1}" if state.task else ""
        self.track.display.print(f"resuming after {state.done} of {len(self.method.curriculum())} tasks{inside}")
        return state

    def evaluate(self, state: RunState, row: int) -> None:
        """Measures row `row` of the matrix, as much of it as evaluation.matrix and .every ask for."""
        kind, total = self.config.evaluation.matrix, len(self.benchmark)
        tasks = range(total if kind is Matrix.full or row == total else row if kind is Matrix.seen else 0)
        if row % self.config.evaluation.every and row < total and tasks:
            tasks = range(row - 1, row)
        tasks = self.method.evaluable_tasks(row, tasks)
        if not tasks:
            return
        if row == total:
            state.validation = self.validate(tasks)
        evaluator = Evaluator(self.benchmark, self.data, self.split)
        found = evaluator(self.method, row, list(tasks))
        found.diagnostics |= self.method.diagnostics()
        for matrix, scores in ((state.matrix, found.seen), (state.task_matrix, found.own)):
            for index in tasks:
                matrix.record(row, index, scores[index].value, scores[index].correct, scores[index].total)
        state.diagnostics.append({"row": row, **found.diagnostics})
        if state.costs:
            state.costs[-1] |= self.method.objective.meter.take_evaluation()
        if self.config.evaluation.predictions and get_world().is_main:
            write_predictions(self.out / "predictions", row, found, self.benchmark.names, self.benchmark.labels)
        self.track.log_row(state, row, found)

    def validate(self, tasks: range) -> dict[str, Any] | None:
        """The averages on validation after the last task, by which settings are chosen; None unless all tasks have it.

        It is measured before the last row, so that whatever a method keeps of an evaluation is of that one.
        """
        wanted = self.config.evaluation.validation and self.split == "test"
        if not wanted or len(tasks) < len(self.benchmark) or not all(task.validation for task in self.benchmark.tasks):
            return None
        found = Evaluator(self.benchmark, self.data, "validation")(self.method, len(self.benchmark), list(tasks))
        views = {"average": found.seen, "own_average": found.own}
        return {name: sum(view[index].value for index in tasks) / len(tasks) for name, view in views.items()}

    @property
    def split(self) -> str:
        """What the matrix is measured on."""
        return self.config.evaluation.split.value


def announce(display: Display, method: Method, benchmark: Benchmark, objective: str, split: str) -> None:
    """Prints what is about to be learned, what was resolved, how many texts are cut, and what the data warn of."""
    name, softmax = on_split(benchmark.name, split), run_dir.softmax(benchmark, objective)
    labels, resolved = len(benchmark.labels), method.resolved(benchmark)
    display.print(run_summary.heading(method.name, name, len(benchmark), labels, softmax, resolved))
    if line := cut_line(benchmark.data_record):
        display.print(line)
    for warning in benchmark.data_record["warnings"]:
        log.warning(warning)


def _plain(cfg: DictConfig) -> dict:
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
