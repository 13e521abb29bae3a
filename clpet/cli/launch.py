"""How the processes of a run come to be: one alone, one per GPU of this machine, or one per task of a SLURM step."""

import json
import logging
import logging.config
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clpet.cli.error_messages import format_error
from clpet.config.build import build, parse_config
from clpet.config.schema import require
from clpet.errors import ClpetError
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.run import run
from clpet.runs import run_dir
from clpet.runtime.distributed import LostRank, init_distributed
from clpet.runtime.signals import EXIT_TEMPFAIL, GracefulShutdown, Interrupted
from clpet.session import assemble

SHUTDOWN_TIMEOUT = 90  # seconds that ranks have to save after a signal, before they are killed


class RankError(ClpetError):
    """What ended a rank, as it said it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def launch(cfg: DictConfig, out: Path, overrides: list[str]) -> TransferMatrix | None:
    """Runs the experiment of `cfg` on as many ranks as hardware.ranks says."""
    if cfg.hardware.get("ranks", 1) == 1 or (run_dir.finished_results(out) and not cfg.fresh):
        return run(cfg, out, overrides)
    hardware = assemble(parse_config(cfg))[1]["hardware"]
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    logs = _job_logging()
    if tasks := slurm_tasks():
        fits = hardware.ranks in ("auto", tasks)
        require(fits, "hardware.ranks", hardware.ranks, f"auto, or the {tasks} tasks of this SLURM step")
        os.environ.update(slurm_environment(os.environ))
        rank(plain, out, overrides, logs)
    elif (count := hardware.processes()) == 1:
        return run(cfg, out, overrides)
    else:
        start(count, rank, plain, out, overrides, logs)
    done = run_dir.finished_results(out)
    return TransferMatrix.from_json(done) if done else None


def rank(config: dict, out: Path, overrides: list[str], logs: dict | None) -> None:
    """One rank of a run; its log is the main rank's."""
    hardware = build(config["hardware"], "hardware")
    with init_distributed(hardware.torch_device, hardware.threads) as ranks:
        if logs and ranks.is_main:
            logging.config.dictConfig(logs)
        elif not ranks.is_main:
            logging.disable()
        run(OmegaConf.create(config), out, overrides)


def start(count: int, work: Callable[..., object], *arguments: Any) -> None:
    """Runs `work` in `count` processes of this machine. Raises what the first of them raised, and ends the others.

    A signal is passed on to them; when they have saved, it is answered here, as by a run of one process. Where a
    handler that was there before lets the run go on, they are started again.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT))
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what a person has to know is raised
    while True:
        with tempfile.TemporaryDirectory(prefix="clpet-ranks-") as folder, GracefulShutdown() as shutdown:

            def stop(shutdown: GracefulShutdown = shutdown) -> None:
                raise SignalException("", signal.Signals(shutdown.pending_signal or signal.SIGTERM))

            shutdown.save = stop
            config = LaunchConfig(1, 1, count, logs_specs=DefaultLogsSpecs(folder), run_id=Path(folder).name,
                                  rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
                                  max_restarts=0)  # fmt: skip
            try:
                elastic_launch(config, _rank)(folder, work, arguments)
                return
            except SignalException as asked:
                shutdown.pending_signal = int(asked.sigval)
            except ChildFailedError as error:
                shutdown.pending_signal = _answer(Path(folder), *error.get_first_failure())
            shutdown.exit_if_requested()


def _rank(folder: str, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """A process of `start`: leaves what ended it in the folder."""
    os.setpgrp()  # Ctrl-C reaches the launcher, which passes it on: twice would end it without saving
    try:
        work(*arguments)
    except (Exception, Interrupted) as error:
        message, code = format_error(error)
        found = {"time": time.time(), "message": message, "code": code, "lost": isinstance(error, LostRank),
                 "signal": getattr(error, "signum", None)}  # fmt: skip
        Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
        sys.stderr.flush()
        os._exit(code)


def _answer(folder: Path, number: int, failure: Any) -> int:
    """The signal that ended the ranks by its number. Raises RankError with what the first one said otherwise."""
    said = sorted((json.loads(path.read_text()) for path in folder.glob("rank*.json")), key=lambda one: one["time"])
    for found in said:
        if not (found["lost"] or found["signal"]):
            raise RankError(found["message"], found["code"])
    if failure.exitcode == EXIT_TEMPFAIL:
        return next(found["signal"] for found in said if found["signal"])
    killed = failure.exitcode < 0
    how = f"was killed ({signal.Signals(-failure.exitcode).name})" if killed else "or another one has ended unheard"
    raise RankError(f"rank {number} {how}: the same command goes on from what is saved", 1)


def slurm_tasks() -> int:
    """How many processes srun has started beside this one, itself included; 0 where there are no others."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if tasks > 1 else 0


def slurm_environment(found: Any) -> dict[str, str]:
    """What torch.distributed has to know, from what srun says: a process's number, and where the first one is."""
    nodes, host = int(found.get("SLURM_STEP_NUM_NODES", "1")), "127.0.0.1"
    if nodes > 1:
        command = ["scontrol", "show", "hostnames", found["SLURM_STEP_NODELIST"]]
        host = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    step = f"{found['SLURM_JOB_ID']}{found.get('SLURM_STEP_ID', '')}"
    tasks = int(found["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": found["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": found["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(-(-tasks // nodes)),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(20000 + int(step) % 20000),
    }


def _job_logging() -> dict | None:
    """How Hydra has set up this run's log."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    return OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)  # type: ignore[return-value]
