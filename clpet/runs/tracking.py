"""Where figures go while a run goes on: the screen, metrics.jsonl, and wandb (online when it can, else offline)."""

import contextlib
import json
import logging
import netrc
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from clpet.config.schema import require
from clpet.escape import inline
from clpet.evaluation.evaluator import Evaluation
from clpet.metrics.transfer_matrix import TransferMatrix, on_split
from clpet.reporting.progress import Display
from clpet.reporting.tables import matrix_table, summary_line
from clpet.runtime.atomic_io import atomic_file, write_text
from clpet.runtime.distributed import get_world
from clpet.runtime.run_checkpoint import RunState

log = logging.getLogger(__name__)


class Mode(Enum):
    """auto tries wandb's server once and goes on offline; off writes nothing for wandb."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class Tracking:
    """A tracking group option."""

    name: str = "auto"
    mode: Mode = Mode.auto
    project: str = "clpet"
    entity: str | None = None
    timeout: float = 10.0
    finish_timeout: float = 60.0

    def __post_init__(self) -> None:
        require(self.timeout > 0, "tracking.timeout", self.timeout, "more than 0 seconds")
        require(self.finish_timeout > 0, "tracking.finish_timeout", self.finish_timeout, "more than 0 seconds")


class Tracker:
    """Writes one run's figures, on its main rank. Use as a context; `display` is its Progress."""

    def __init__(self, settings: Tracking, out: Path, display: Display, config: dict, identity: dict[str, str]) -> None:
        self.settings, self.out, self.display = settings, out, display
        self.config, self.identity = config, identity
        self.run: Any = None

    def __enter__(self) -> "Tracker":
        if self.settings.mode is not Mode.off and get_world().is_main:
            self.run = self._start_wandb()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.display.close()
        if self.run is not None:
            self._safely("finish", lambda: self.run.finish(exit_code=0 if kind is None else 1))

    def forget_after(self, done: int) -> None:
        """Drops the lines of entries that will be learned again after a resume."""
        path = self.out / "metrics.jsonl"
        if path.exists() and get_world().is_main:
            lines = [line for line in path.read_text().splitlines() if _done(line) <= done]
            write_text(path, "".join(f"{line}\n" for line in lines))

    def evaluated(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        """Records one row of the matrix: lines, table on the screen, wandb scalars on the task axis."""
        if not get_world().is_main:
            return
        names = state.matrix.tasks
        tasks = {
            names[index]: {"score": score.value, "correct": score.correct, "total": score.total,
                           "own_labels": evaluation.own[index].value}
            for index, score in evaluation.seen.items()
        }  # fmt: skip
        line: dict[str, Any] = {"done": state.done, "row": row, "split": self.split, "tasks": tasks}
        line |= evaluation.diagnostics
        line |= {"average": state.matrix.average(row, row), "whole": state.matrix.whole(row, row)} if row else {}
        line |= {"cost": state.costs[-1]} if state.costs else {}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(state, row, evaluation)
        if self.run is not None:
            scalars = {f"score/{name}": value["score"] for name, value in tasks.items()}
            scalars |= {f"own_labels/{name}": value["own_labels"] for name, value in tasks.items()}
            scalars |= {
                key: line[key] for key in ("average", "whole", *evaluation.diagnostics) if line.get(key) is not None
            }
            cost = {f"cost/{key}": value for key, value in line.get("cost", {}).items()}
            named = {self._key(inline(key)): value for key, value in scalars.items()}
            self._safely("log", lambda: self.run.log({"task": row, **named, **cost}))

    def finished(self, results: dict[str, Any], pictures: list[Path]) -> None:
        """Writes the final table, pictures and summary to wandb."""
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
            drawn = {self._key(f"{path.stem}_picture"): wandb.Image(str(path)) for path in pictures}
            self.run.log({self._key("transfer"): table, **drawn})
            known = {self._key(key): value for key, value in results["metrics"].items() if value is not None}
            if found := results.get("validation"):
                known["validation/average"] = found["average"]
            self.run.summary.update(known)

        self._safely("log", write)

    @property
    def split(self) -> str:
        """What the matrix is measured on."""
        return self.config["evaluation"]["split"]

    def _key(self, name: str) -> str:
        """The name of a figure on wandb: those of validation never mix with those of test."""
        return name if self.split == "test" else f"{self.split}/{name}"

    def _show(self, state: RunState, row: int, evaluation: Evaluation) -> None:
        self.display.print()
        self.display.print(matrix_table(state.matrix, row))
        if row:
            overall = {key: value for key, value in evaluation.diagnostics.items() if "/" not in key}
            extra = "".join(f" · {key.replace('_', ' ')} {value:.2f}" for key, value in overall.items())
            self.display.print(summary_line(state.matrix, row) + extra + on_split("", self.split))
        self.display.print()

    def _start_wandb(self) -> Any:
        import wandb

        mode = self._mode()
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                run = wandb.init(
                    project=self.settings.project,
                    entity=self.settings.entity,
                    dir=str(self.out),
                    mode=attempt,  # type: ignore[arg-type]
                    config=self.config,
                    id=f"{self.identity['signature']}-s{self.identity['seed']}",
                    resume="allow" if attempt == "online" else None,
                    name=f"{self.config['method']['name']}-s{self.identity['seed']}",
                    group=f"{self.config['benchmark']['name']}/{self.config['method']['name']}/{self.identity['signature']}",
                    job_type=self.config["method"]["name"],
                    settings=wandb.Settings(
                        silent=True,
                        console="off",
                        init_timeout=self.settings.timeout,
                        finish_timeout=self.settings.finish_timeout,
                        finish_timeout_raises=True,
                        x_transaction_log_flush_interval=1.0,  # a killed run keeps its rows; 15 seconds by default
                    ),
                )
                run.define_metric("*", step_metric="task")
                return run
            except Exception as error:
                then = "it is offline" if attempt == "online" else "the run goes on without"
                log.warning("wandb does not start %s (%s); %s", attempt, str(error).split("\n")[0], then)
                _let_go()
        return None

    def _mode(self) -> str:
        """The mode to try first: a server is asked only where there is a key to log in with."""
        if self.settings.mode is not Mode.auto:
            return self.settings.mode.value
        named = os.environ.get("WANDB_MODE")
        if named in ("online", "offline", "disabled"):
            return named
        return "online" if _has_key() else "offline"

    def _safely(self, what: str, action: Any) -> None:
        """Tracking never stops a run."""
        try:
            action()
        except Exception as error:
            later = f"wandb sync {Path(self.run.dir).parent} sends later what is missing"
            log.warning("wandb cannot %s (%s); the run goes on without it, %s", what, str(error).split("\n")[0], later)
            self.run = None
            _let_go()


def _let_go() -> None:
    """Ends wandb's service, which would hold the run's name and complain at exit."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _done(line: str) -> float:
    """How many entries were learned when a line was written; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["done"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def write_predictions(folder: Path, row: int, evaluation: Evaluation, names: list[str], labels: list[str]) -> None:
    """One parquet file per evaluation, one row per test example; a prediction is null where no label was seen yet."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    table = evaluation.rows

    def spell(ids: np.ndarray, words: list[str]) -> pyarrow.Array:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array(ids, pyarrow.int32(), mask=ids < 0), words)

    columns: dict[str, Any] = {"example": table["row"], "task": spell(table["task"], names)}
    for name in ("label", "prediction", "own_prediction", "score"):
        if name in table:
            words = np.issubdtype(table[name].dtype, np.integer)
            columns[name] = spell(table[name], labels) if words else pyarrow.array(table[name].tolist())
    columns |= {"selected": spell(table["selected"], names)} if "selected" in table else {}
    columns |= {"right_picks": pyarrow.array(table["right_picks"])} if "right_picks" in table else {}
    with atomic_file(folder / f"after-{row:03d}.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
