"""Reports the metrics of a running experiment: to the screen, to metrics.jsonl, and to wandb (online or offline)."""

import contextlib
import logging
import netrc
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from clpet.config.schema import require
from clpet.escape import inline
from clpet.evaluation.evaluator import Evaluation
from clpet.metrics.transfer_matrix import TransferMatrix, on_split
from clpet.records import Json, Results, StepLine
from clpet.reporting.progress import Display
from clpet.reporting.tables import matrix_table, summary_line
from clpet.runs import line_files
from clpet.runtime.atomic_io import atomic_file
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
STEP_SCALARS = ("loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "memory_gb", "validation")
STOP_SECONDS = 5.0  # for wandb's background process to end by itself


class Mode(Enum):
    """The mode of wandb: auto tries its server once and falls back to offline; off writes nothing for wandb."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class Tracking:
    """An option of the group `tracking`."""

    name: str = "auto"
    mode: Mode = Mode.auto
    project: str = "clpet"
    entity: str | None = None
    timeout: float = 10.0  # seconds to wait for the server at the start
    finish_timeout: float = 60.0  # seconds to wait for the last uploads at the end

    def __post_init__(self) -> None:
        require(self.timeout > 0, "tracking.timeout", self.timeout, "more than 0 seconds")
        require(self.finish_timeout > 0, "tracking.finish_timeout", self.finish_timeout, "more than 0 seconds")


class Tracker:
    """Reports one run's metrics, on the main rank only. A context manager; `display` shows the progress."""

    def __init__(
        self, settings: Tracking, out: Path, display: Display, config: dict[str, Json], identity: dict[str, str]
    ) -> None:
        self.settings, self.out, self.display = settings, out, display
        self.config, self.identity = config, identity
        self.run: Any = None  # the wandb.Run while wandb works, else None

    def __enter__(self) -> "Tracker":
        if self.settings.mode is not Mode.off and get_world().is_main:
            self.run = self._start_wandb()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.display.close()
        if self.run is not None:
            self._safely("finish", lambda: self.run.finish(exit_code=0 if kind is None else 1))

    def begin(self, state: RunState | None) -> None:
        """Removes the lines of files that a run resumed at `state` will write again; all lines of a run that starts."""
        if get_world().is_main:
            line_files.drop_repeated(self.out, state)

    def log_steps(self, lines: Sequence[StepLine]) -> None:
        """Reports lines of the step log: to steps.jsonl, and as scalars over the axis `step` to wandb."""
        line_files.append(self.out / line_files.STEPS, lines)
        if self.run is not None:
            self._safely("log", lambda: [self.run.log(step_scalars(line)) for line in lines])

    def log_row(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        """Reports row `row` of the matrix: a line of metrics.jsonl, a table on the screen, scalars for wandb."""
        if not get_world().is_main:
            return
        names = state.matrix.tasks
        tasks = {
            names[index]: {"score": score.value, "correct": score.correct, "total": score.total,
                           "own_labels": evaluation.per_task[index].value}
            for index, score in evaluation.seen.items()
        }  # fmt: skip
        line: dict[str, Json] = {"done": state.done, "row": row, "split": self.split, "tasks": tasks}
        line |= evaluation.diagnostics
        matrix = state.matrix
        line |= {"average": matrix.average(row, row), "whole": matrix.micro_average(row, row)} if row else {}
        cost: Mapping[str, Json] = cast(Mapping[str, Json], state.costs[-1]) if state.costs else {}
        line |= {"cost": cost} if cost else {}
        line_files.append(self.out / line_files.METRICS, [line])
        self._show(state, row, evaluation)
        if self.run is not None:
            scalars: dict[str, Json] = {f"score/{name}": value["score"] for name, value in tasks.items()}
            scalars |= {f"own_labels/{name}": value["own_labels"] for name, value in tasks.items()}
            scalars |= {
                key: line[key] for key in ("average", "whole", *evaluation.diagnostics) if line.get(key) is not None
            }
            costs = {f"cost/{key}": value for key, value in cost.items()}
            scalars = {self._key(inline(key)): value for key, value in scalars.items()}
            self._safely("log", lambda: self.run.log({"task": row, **scalars, **costs}))

    def log_results(self, results: Results, figures: list[Path]) -> None:
        """Writes the final matrices as one table, the figures and the summary metrics to wandb."""
        if self.run is None:
            return
        import wandb

        def write() -> None:
            matrix = TransferMatrix.from_json(results)
            views = {"transfer": results["scores"], "backward": results["backward"], "forward": results["forward"],
                     "own_labels": results["task_scores"]}  # fmt: skip
            names = [inline(name) for name in matrix.tasks]
            rows = [
                [view, row, names[row - 1] if row else "", task, values[row][column]]
                for view, values in views.items()
                for row in range(len(values))
                for column, task in enumerate(names)
                if values[row][column] is not None
            ]
            table = wandb.Table(columns=["matrix", "row", "after", "task", "value"], data=rows)
            images = {self._key(f"{path.stem}_picture"): wandb.Image(str(path)) for path in figures}
            self.run.log({self._key("transfer"): table, **images})
            summary = {self._key(key): value for key, value in results["metrics"].items() if value is not None}
            if validation := results.get("validation"):
                summary["validation/average"] = validation["average"]
            self.run.summary.update(summary)

        self._safely("log", write)

    @property
    def split(self) -> str:
        """The split that the matrix is measured on."""
        return self._option("evaluation", "split")

    def _option(self, group: str, key: str) -> str:
        return str(cast(Mapping[str, Json], self.config[group])[key])

    def _key(self, name: str) -> str:
        """The name of a metric on wandb. A prefix keeps metrics on validation apart from those on test."""
        return name if self.split == "test" else f"{self.split}/{name}"

    def _show(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        self.display.print()
        self.display.print(matrix_table(state.matrix, row))
        if row:
            overall = {key: value for key, value in evaluation.diagnostics.items() if "/" not in key}
            extra = "".join(f" · {key.replace('_', ' ')} {value:.2f}" for key, value in overall.items())
            self.display.print(summary_line(state.matrix, row) + extra + on_split("", self.split))
        self.display.print()

    def _start_wandb(self) -> "wandb.Run | None":
        """The wandb run: in the configured mode, else offline, else None with a warning."""
        # wandb's reports about its own errors would delay the exit while its server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode, method = self._mode(), self._option("method", "name")
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                run = wandb.init(
                    project=self.settings.project,
                    entity=self.settings.entity,
                    dir=str(self.out),
                    mode=attempt,  # type: ignore[arg-type]
                    config=self.config,
                    # The same id on every start: a resumed run continues its curves instead of starting new ones.
                    id=f"{self.identity['signature']}-s{self.identity['seed']}",
                    resume="allow" if attempt == "online" else None,
                    name=f"{method}-s{self.identity['seed']}",
                    group=f"{self._option('benchmark', 'name')}/{method}/{self.identity['signature']}",
                    job_type=method,
                    settings=wandb.Settings(
                        silent=True,
                        console="off",
                        init_timeout=self.settings.timeout,
                        finish_timeout=self.settings.finish_timeout,
                        finish_timeout_raises=True,
                        x_transaction_log_flush_interval=1.0,  # seconds; the default of 15 loses rows of a killed run
                    ),
                )
                run.define_metric("*", step_metric="task")
                for name in STEP_SCALARS:
                    run.define_metric(f"train/{name}", step_metric="step")
                return run
            except Exception as error:
                fallback = "falling back to offline" if attempt == "online" else "continuing without wandb"
                log.warning("wandb does not start %s (%s); %s", attempt, str(error).split("\n")[0], fallback)
                _stop_service()
        return None

    def _mode(self) -> str:
        """The mode to try first. auto means online only with an API key: without one, wandb would wait for a login."""
        if self.settings.mode is not Mode.auto:
            return str(self.settings.mode.value)
        mode = os.environ.get("WANDB_MODE", "")
        if mode in ("online", "offline", "disabled"):
            return mode
        return "online" if _has_key() else "offline"

    def _safely(self, what: str, action: Callable[[], object]) -> None:
        """Performs an action of wandb; an error or a long wait ends tracking with a warning, but never the run."""
        try:
            _within(self.settings.finish_timeout, action)
        except Exception as error:
            sync = f"upload the missing data later with `wandb sync {Path(self.run.dir).parent}`"
            log.warning("wandb cannot %s (%s); continuing without it; %s", what, str(error).split("\n")[0], sync)
            self.run = None
            _stop_service()


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Performs an action in a thread of its own and waits for its end.

    wandb has calls without a time limit of their own, so the limit is set from outside.

    Raises:
        TimeoutError: the action did not end within `seconds`; its thread is left behind.
        Exception: whatever the action raised.
    """
    errors: list[Exception] = []

    def perform() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=perform, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    if errors:
        raise errors[0]


def _stop_service() -> None:
    """Stops wandb's background process, which would otherwise keep the run's id and print errors at exit.

    Asked to stop, the process first tries to upload what is left, for any length of time; it is killed after
    a few seconds. What it was given is in the run's folder by then.
    """
    import psutil
    import wandb

    with contextlib.suppress(Exception):
        _within(STOP_SECONDS, wandb.teardown)
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb" in process.name():
                process.kill()


def step_scalars(line: StepLine) -> dict[str, Json]:
    """The numbers of a line of the step log by their names in a tracker, without those that are None."""
    values = cast(Mapping[str, Json], line)
    scalars = {f"train/{name}": values[name] for name in STEP_SCALARS if values.get(name) is not None}
    return {"step": line["step"], **scalars}


def _has_key() -> bool:
    """Whether wandb would find an API key, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def write_predictions(folder: Path, row: int, evaluation: Evaluation, names: list[str], labels: list[str]) -> None:
    """Writes after-NNN.parquet with a row per test example; a prediction is null where no label was seen yet."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    table = evaluation.rows

    def dictionary(ids: np.ndarray, words: list[str]) -> pyarrow.Array:
        """The words of ids; null for -1."""
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array(ids, pyarrow.int32(), mask=ids < 0), words)

    columns: dict[str, pyarrow.Array] = {"example": table["row"], "task": dictionary(table["task"], names)}
    for name in ("label", "prediction", "own_prediction", "score"):
        if name in table:
            is_id = np.issubdtype(table[name].dtype, np.integer)  # generated answers are strings, scores are floats
            columns[name] = dictionary(table[name], labels) if is_id else pyarrow.array(table[name].tolist())
    columns |= {"selected": dictionary(table["selected"], names)} if "selected" in table else {}
    columns |= {"right_picks": pyarrow.array(table["right_picks"])} if "right_picks" in table else {}
    with atomic_file(folder / f"after-{row:03d}.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
