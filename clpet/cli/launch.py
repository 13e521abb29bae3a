"""Starts the processes (ranks) of a run: one, one per GPU of this machine, or those that a launcher has started."""

import contextlib
import json
import logging
import logging.config
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from omegaconf import DictConfig, OmegaConf

from clpet.cli.error_messages import format_error
from clpet.config.build import build, parse_config
from clpet.errors import ClpetError, ConfigError, HostError
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Json
from clpet.run import run
from clpet.runs import run_dir
from clpet.runtime.distributed import LostRank, World, init_distributed
from clpet.runtime.launchers import rank_variables, started_ranks, unmute
from clpet.runtime.signals import EXIT_TEMPFAIL, GracefulShutdown, Interrupted
from clpet.wiring import Components

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

START_METHOD = "spawn"  # of ranks: a fork could not use a GPU that its parent has used
SHUTDOWN_TIMEOUT = 90  # seconds that ranks have to save after a signal, before they are killed


class RankError(ClpetError):
    """The error reported by a failed rank."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def launch(
    cfg: DictConfig, out: Path, overrides: list[str], quiet: bool = False, job_logging: dict[str, Json] | None = None
) -> TransferMatrix | None:
    """Runs the experiment of `cfg` on hardware.ranks ranks, or on those that a launcher has started.

    Returns its matrix, None after a dry run. With `quiet` nothing is printed but warnings. `job_logging` configures the
    logging of the main one of several ranks, by default as Hydra does.
    """
    started = started_ranks()
    if not started and (cfg.hardware.get("ranks", 1) == 1 or (run_dir.finished_results(out) and not cfg.fresh)):
        return run(cfg, out, overrides, quiet)
    hardware = Components.build(parse_config(cfg)).hardware  # also reports wrong options before processes are started
    plain = cast(dict[str, Json], OmegaConf.to_container(cfg, resolve=True))
    job_logging = job_logging or _job_logging()
    if started:
        is_set = any(word.lstrip("+").startswith("hardware.ranks=") for word in overrides)
        started.check(cast(int | str, hardware.ranks), is_set)
        os.environ.update(rank_variables())
        return run_rank(plain, out, overrides, job_logging, quiet)
    if (count := hardware.processes()) == 1:
        return run(cfg, out, overrides, quiet)
    start_ranks(count, run_rank, plain, out, overrides, job_logging, quiet)
    results = run_dir.finished_results(out)
    return TransferMatrix.from_json(results) if results else None


def run_rank(
    config: dict[str, Json], out: Path, overrides: list[str], job_logging: dict[str, Json] | None, quiet: bool = False
) -> TransferMatrix | None:
    """Runs the experiment as one rank; only the main rank logs."""
    hardware = build(cast(dict[str, Json], config["hardware"]), "hardware")
    with init_distributed(hardware.torch_device, hardware.threads) as world, first_error(world):
        if job_logging and world.is_main:
            logging.config.dictConfig(job_logging)
        elif not world.is_main:
            logging.disable()
        if len(set(world.gather(run_dir_and_mode(config, out)))) > 1:
            raise ConfigError("the ranks were started with different options: give all of them the same command")
        if hardware.torch_device.type == "cuda":
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            check_gpus(world.gather((platform.node(), str(properties.uuid))))
        matrix = run(OmegaConf.create(config), out, overrides, quiet)
        world.barrier()  # what follows on any rank may read the results, which the main rank writes last
        logging.disable(logging.NOTSET)  # for the script that has called clpet.train
        return matrix


def check_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Raises HostError if two ranks have the same GPU, given (machine, GPU) of every rank; NCCL cannot connect them."""
    machine, count = max(((gpu[0], gpus.count(gpu)) for gpu in gpus), key=lambda shared: shared[1])
    if count > 1:
        raise HostError(
            f"{count} of the {len(gpus)} ranks would share a GPU of {machine}: start one process for each GPU, or set "
            "hardware=cpu"
        )


def run_dir_and_mode(config: dict[str, Json], out: Path) -> str:
    """What all ranks must have in common: the name of the run directory, a hash of the options, and the mode."""
    return f"{'/'.join(out.parts[-3:])} fresh={config['fresh']} dry_run={config['dry_run']}"


@contextlib.contextmanager
def first_error(world: World) -> Iterator[None]:
    """Raises the error of the block on the rank that fails first, and SystemExit on the others, which print nothing.

    With submitit every rank raises its own: submitit returns them to the process that has submitted the job.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        if "SUBMITIT_EXECUTOR" not in os.environ and not world.claim("error"):
            code = EXIT_TEMPFAIL if isinstance(error, Interrupted) else getattr(error, "exit_code", 1)
            raise SystemExit(code) from None
        unmute()
        raise


def start_ranks(count: int, work: Callable[..., object], *arguments: object) -> None:
    """Calls `work(*arguments)` in `count` processes of this machine.

    If one fails, the others are ended and RankError is raised. A signal is passed on to the processes; when they have
    saved, this process handles it as a run of one process would. If an earlier handler, such as submitit's for SIGTERM,
    returns, the processes are started again and resume.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT))
    while True:
        with tempfile.TemporaryDirectory(prefix="clpet-ranks-") as folder, GracefulShutdown() as shutdown:

            def stop(shutdown: GracefulShutdown = shutdown) -> None:  # torch's launcher passes this signal to the ranks
                raise SignalException("", signal.Signals(shutdown.pending_signal or signal.SIGTERM))

            shutdown.save = stop
            try:
                _elastic_launch(count, folder, work, arguments)
                return
            except SignalException as stopped:
                shutdown.pending_signal = int(stopped.sigval)
            except ChildFailedError as error:
                shutdown.pending_signal = _signal_of(Path(folder), *error.get_first_failure())
            shutdown.exit_if_requested()


def _elastic_launch(count: int, folder: str, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Starts the processes with torch's launcher, without its restarts: clpet resumes from checkpoints instead."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:  # after the imports, which create the loggers
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised here instead, in one line
    config = LaunchConfig(1, 1, count, logs_specs=DefaultLogsSpecs(folder), run_id=Path(folder).name,
                          rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
                          max_restarts=0, start_method=START_METHOD)  # fmt: skip
    elastic_launch(config, _rank)(folder, work, arguments)


def _rank(folder: str, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """One process of `start_ranks`; writes its error, if any, to rankN.json in the folder."""
    os.setpgrp()  # Ctrl-C must only reach the launcher, which passes it on: a second one would end it without saving
    try:
        work(*arguments)
    except (Exception, Interrupted) as error:
        message, code = format_error(error)
        report = {"time": time.time(), "message": message, "code": code, "lost": isinstance(error, LostRank),
                  "signal": getattr(error, "signum", None)}  # fmt: skip
        Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
        sys.stderr.flush()
        os._exit(code)


def _signal_of(folder: Path, number: int, failure: "ProcessFailure") -> int:
    """The number of the signal that ended the ranks; raises RankError with the first rank's message if none did."""
    reports = sorted((json.loads(path.read_text()) for path in folder.glob("rank*.json")), key=lambda one: one["time"])
    for report in reports:
        if not (report["lost"] or report["signal"]):  # a lost rank only reports that another one has failed
            raise RankError(report["message"], report["code"])
    if failure.exitcode == EXIT_TEMPFAIL:
        return next(int(report["signal"]) for report in reports if report["signal"])
    killed = failure.exitcode < 0
    name = signal.Signals(-failure.exitcode).name if killed else ""
    how = f"was killed ({name})" if killed else "or another rank ended without a message"
    raise RankError(f"rank {number} {how}: re-run the same command to resume from the latest checkpoint", 1)


def _job_logging() -> dict[str, Json] | None:
    """Hydra's logging configuration of this run; None outside of Hydra."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    return cast(dict[str, Json], OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))
