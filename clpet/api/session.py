"""Learn the tasks in a loop of your own."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.api.guest import guest
from clpet.api.model import TextModel
from clpet.api.run import Run
from clpet.api.words import compose, overrides
from clpet.errors import ConfigError, enough_memory

if TYPE_CHECKING:
    import pyarrow
    from omegaconf import DictConfig

    from clpet.api.words import Value
    from clpet.data.benchmark import Task
    from clpet.metrics.transfer_matrix import TransferMatrix
    from clpet.run import Experiment
    from clpet.training.trainer import Trainer


class Session(TextModel):
    """Benchmark, model, method and trainer of a run, for a loop of your own; `clpet.session` makes it.

    Iterating gives the tasks that are left to learn, in the benchmark's order; method=joint has one entry for all.

    >>> session = clpet.session("method=ewc", "debug=smoke", "tasks=[data,files]", quiet=True)
    >>> for task in session:
    ...     session.learn(task)
    ...     print(task.name, sorted(session.evaluate()))
    data ['data', 'files']
    files ['data', 'files']
    """

    def __init__(self, cfg: "DictConfig", words: list[str], quiet: bool = False) -> None:
        from rich.console import Console

        from clpet.config.build import parse_config
        from clpet.metrics.transfer_matrix import TransferMatrix
        from clpet.reporting.progress import Display
        from clpet.run import announce, load_benchmark
        from clpet.runtime.run_checkpoint import RunState
        from clpet.wiring import Components
        from clpet.wiring import Session as Wired

        config = parse_config(cfg)
        components = Components.build(config)
        benchmark = load_benchmark(components, words)
        self._cfg, self._words = cfg, words
        self._display = Display(Console(quiet=quiet, force_jupyter=False), len(benchmark))
        self._folder = folder = Path(tempfile.mkdtemp(prefix="clpet-session-"))  # the files of a run until `save`
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        cache = Path(config.cache_dir) if config.cache_dir else None
        components = components.with_base_model(benchmark, cache, folder, self._display)
        super().__init__(Wired.assemble(components, benchmark, self._display))
        announce(self._display, self.wired)
        names, direction = self.benchmark.names, self.benchmark.direction
        self._state = RunState(TransferMatrix(names, direction), TransferMatrix(names, direction))
        self._experiment = self._experiment_in(folder)

    def __repr__(self) -> str:
        return f"<clpet.Session: {self.method.name}, {self._state.done} of {len(self.method.curriculum())} tasks>"

    def __iter__(self) -> "Iterator[Task]":
        while (position := self._state.done) < len(self.method.curriculum()):
            yield self.method.curriculum()[position][1]
            if self._state.done == position:
                raise ConfigError("the loop has not learned its task: call session.learn(task) in it")

    @property
    def after(self) -> int:
        """The number of tasks learned so far: the row of the matrix that `evaluate` measures."""
        done = self._state.done
        return self.method.curriculum()[done - 1][0] + 1 if done else 0

    @property
    def trainer(self) -> "Trainer":
        """The trainer."""
        return self.wired.trainer

    @property
    def matrix(self) -> "TransferMatrix":
        """The transfer matrix, with the rows that were evaluated; NaN in all others."""
        return self._state.matrix

    def learn(self, task: "Task | str") -> None:
        """Learns the next task, given as an object or by its name. Raises ConfigError for any other task."""
        from clpet.runs import run_dir
        from clpet.training.trainer import quiet_libraries

        state, curriculum = self._state, self.method.curriculum()
        name = task if isinstance(task, str) else task.name
        following = curriculum[state.done][1].name if state.done < len(curriculum) else None
        if name != following:
            turn = "all tasks are learned" if following is None else f"the next task is {following}"
            raise ConfigError(f"cannot learn task {name}: {turn}; benchmark.order sets the order")
        with guest(), quiet_libraries(), enough_memory(self.method.objective.memory_advice):
            self._display.task(state.done + 1, name)
            self.wired.learn(curriculum[state.done][0], last=state.done + 1 == len(curriculum))
            self._display.task_done()
        state.costs.append(run_dir.task_cost(self.method))
        state.done, state.trainer = state.done + 1, self.trainer.state()

    def evaluate(self) -> dict[str, float]:
        """Measures the row of the matrix after the tasks learned so far; returns {task: score}.

        The options under `evaluation` choose the tasks, as in `clpet.train`.
        """
        from clpet.training.trainer import quiet_libraries

        with guest(), quiet_libraries(), enough_memory(self.method.objective.memory_advice):
            self._experiment.evaluate(self._state, self.after)
        row = zip(self.tasks, self.matrix.scores[self.after].tolist(), strict=True)
        return {task: score for task, score in row if score == score}  # without NaN

    def predictions(self, after: int | None = None) -> "pyarrow.Table":
        """The predictions of the evaluations so far, as `Run.predictions` gives them."""
        return Run(self._folder).predictions(after)

    def save(self, path: str | Path) -> Run:
        """Writes what was learned and measured as a run directory, which every command and `clpet.load` read.

        Raises ConfigError if the folder already has files.

        >>> session = clpet.session("method=ewc", "debug=smoke", "tasks=[data,files]", quiet=True)
        >>> for task in session:
        ...     session.learn(task)
        >>> scores = session.evaluate()
        >>> run = session.save("outputs/mine/ewc/s0-a")
        >>> run.load().scores == scores
        True
        """
        out = Path(path)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} already has files: give the name of a new folder")
        with guest():
            shutil.copytree(self._folder, out, dirs_exist_ok=True)
            experiment = self._experiment_in(out)
            experiment.start()
            self._state.save(out / "state", self.method.state_dict(), experiment.identity)
            experiment.finish(self._state)
        return Run(out)

    def _experiment_in(self, folder: Path) -> "Experiment":
        """The experiment that measures this session and writes to a folder; its tracker is not entered: no wandb."""
        from clpet.run import Experiment

        return Experiment(self._cfg, self._words, self.wired, folder, self._display)


def session(*words: str, quiet: bool = False, config_dir: str | Path | None = None, **options: "Value") -> Session:
    """Wires the benchmark, model, method and trainer of a run, for a loop of your own in memory.

    Arguments and errors are those of `clpet.train`, and so are the numbers of a loop that learns and evaluates every
    task. Nothing is written but caches, until `Session.save`; an interrupted loop starts over.

    >>> session = clpet.session("method=sequential", "debug=smoke", quiet=True)
    >>> session.tasks
    ['data', 'internet', 'running', 'files', 'code']
    """
    with guest(config_dir):
        named = overrides(words, options)
        cfg = compose(named)
        from clpet.training.trainer import quiet_libraries

        with quiet_libraries():
            return Session(cfg, named, quiet)
