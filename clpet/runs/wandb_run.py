"""A run on wandb, online or offline. wandb never stops a run: every call has a time limit and may fail."""

import contextlib
import logging
import netrc
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clpet.escape import inline
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Json, Results
from clpet.runs.trackers import Worker
from clpet.runs.tracking_options import Mode, Tracking

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

STEP_SCALARS = ("loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "memory_gb", "validation")
STOP_SECONDS = 5.0  # for wandb's background process to end by itself


class WandbRun:
    """The run on wandb; `run` is None where wandb does not start or has failed.

    `names` are the default names of the run: name, group and job_type. `prefix` keeps metrics on validation apart.
    """

    def __init__(self, settings: Tracking, out: Path, names: dict[str, str], prefix: str) -> None:
        self.settings, self.out, self.names, self.prefix = settings, out, names, prefix
        self.run: Any = None  # a wandb.Run
        self.online = False
        self.worker = Worker()

    def start(self, config: Mapping[str, Json], run_id: str) -> None:
        """Starts in the configured mode, else offline, else not at all, with a warning."""
        # wandb's reports about its own errors would delay the exit while its server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for attempt in dict.fromkeys([mode(self.settings.mode), "offline"]):
            try:
                self.run, self.online = self._init(attempt, config, run_id), attempt == "online"
                self.run.define_metric("*", step_metric="task")
                for name in STEP_SCALARS:
                    self.run.define_metric(f"train/{name}", step_metric="step")
                return
            except Exception as error:
                fallback = "falling back to offline" if attempt == "online" else "continuing without wandb"
                log.warning("wandb does not start %s (%s); %s", attempt, str(error).split("\n")[0], fallback)
                _stop_service()

    def _init(self, attempt: str, config: Mapping[str, Json], run_id: str) -> "wandb.Run":
        import wandb

        settings, environment = self.settings, os.environ  # wandb itself reads its variables once per process
        return wandb.init(
            project=settings.project or environment.get("WANDB_PROJECT") or "clpet",
            entity=settings.entity or environment.get("WANDB_ENTITY"),
            tags=settings.tags or [tag for tag in environment.get("WANDB_TAGS", "").split(",") if tag] or None,
            notes=settings.notes or environment.get("WANDB_NOTES"),
            dir=str(self.out),
            mode=attempt,  # type: ignore[arg-type]
            config=dict(config),
            # The same id on every start: a resumed run continues its curves instead of starting new ones.
            id=run_id,
            resume="allow" if attempt == "online" else None,
            name=settings.run_name or environment.get("WANDB_NAME") or self.names["name"],
            group=settings.group or environment.get("WANDB_RUN_GROUP") or self.names["group"],
            job_type=environment.get("WANDB_JOB_TYPE") or self.names["job_type"],
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=settings.timeout,
                finish_timeout=settings.finish_timeout,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1.0,  # seconds; the default of 15 loses rows of a killed run
            ),
        )

    def log(self, rows: list[dict[str, Json]]) -> None:
        """Logs rows of scalars; each has its value on the axis `task` or `step`."""
        self._safely("log", lambda: [self.run.log(row) for row in rows])

    def log_results(self, results: Results, figures: list[Path]) -> None:
        """Logs the final matrices as one table, the scores over time as one chart, the figures, and the summary."""

        def write() -> None:
            import wandb

            table = wandb.Table(columns=["matrix", "row", "after", "task", "value"], data=_cells(results))
            images = {self.key(f"{path.stem}_picture"): wandb.Image(str(path)) for path in figures}
            self.run.log({self.key("transfer"): table, **images})
            self.run.log({self.key("scores_over_time"): _curves(results)})
            summary = {self.key(key): value for key, value in results["metrics"].items() if value is not None}
            if validation := results.get("validation"):
                summary["validation/average"] = validation["average"]
            self.run.summary.update(summary)

        self._safely("log", write)

    def upload(self, paths: list[Path]) -> None:
        """Uploads files and folders of the run as an artifact of the type model; missing ones are left out."""

        def write() -> None:
            import wandb

            artifact = wandb.Artifact(f"run-{self.run.id}", type="model")
            for path in paths:
                if path.is_dir():
                    artifact.add_dir(str(path), name=path.name)
                elif path.is_file():
                    artifact.add_file(str(path))
            self.run.log_artifact(artifact)

        self._safely("upload", write)

    def finish(self, failed: bool) -> str | None:
        """Waits for the last uploads. Returns a line with the run's address, offline with the command for an upload."""
        run = self.run
        self._safely("finish", lambda: self.run.finish(exit_code=1 if failed else 0))
        if self.run is None:
            return None
        return f"wandb {run.url}" if self.online else f"sync  wandb sync {shlex.quote(str(self._folder(run)))}"

    def key(self, name: str) -> str:
        """The name of a metric on wandb."""
        return f"{self.prefix}{name}"

    def _safely(self, what: str, action: Callable[[], object]) -> None:
        """Performs an action of wandb; an error or a long wait ends tracking with a warning, but never the run."""
        if self.run is None:
            return
        try:
            self.worker.call(action, self.settings.finish_timeout)
        except Exception as error:
            sync = f"upload the missing data later with `wandb sync {self._folder(self.run)}`"
            log.warning("wandb cannot %s (%s); continuing without it; %s", what, str(error).split("\n")[0], sync)
            self.run = None
            _stop_service()

    def _folder(self, run: "wandb.Run") -> Path:
        return Path(run.dir).parent


def _cells(results: Results) -> list[list[Json]]:
    """[matrix, row, after, task, value] of every measured cell of the final matrices."""
    views = {"transfer": results["scores"], "backward": results["backward"], "forward": results["forward"],
             "own_labels": results["task_scores"]}  # fmt: skip
    names = [inline(name) for name in results["tasks"]]
    return [
        [view, row, names[row - 1] if row else "", task, values[row][column]]
        for view, values in views.items()
        for row in range(len(values))
        for column, task in enumerate(names)
        if values[row][column] is not None
    ]


def _curves(results: Results) -> Any:  # a chart of wandb, whose classes have no annotations
    """A chart with a line per task: its score after every number of learned tasks."""
    import wandb

    matrix = TransferMatrix.from_json(results)
    rows = [row for row, values in enumerate(matrix.scores) if (values == values).any()]
    keys = [inline(name) for name in matrix.tasks]
    ys = [[float(matrix.scores[row, column]) for row in rows] for column in range(len(keys))]
    return wandb.plot.line_series(xs=rows, ys=ys, keys=keys, title="score of every task", xname="tasks learned")


def mode(setting: Mode) -> str:
    """The mode to try first. auto means online only with an API key: without one, wandb would wait for a login."""
    if setting is not Mode.auto:
        return str(setting.value)
    configured = os.environ.get("WANDB_MODE", "")
    if configured in ("online", "offline", "disabled"):
        return configured
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether wandb would find an API key, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _stop_service() -> None:
    """Stops wandb's background process, which would otherwise keep the run's id and print errors at exit.

    Asked to stop, the process first tries to upload what is left, for any length of time; it is killed after
    a few seconds. What it was given is in the run's folder by then.
    """
    import psutil
    import wandb

    with contextlib.suppress(Exception):
        Worker().call(cast(Callable[[], object], wandb.teardown), STOP_SECONDS)
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb" in process.name():
                process.kill()
