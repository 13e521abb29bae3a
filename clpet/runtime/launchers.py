"""Which of the processes of a run this one is, where a launcher has started several: torchrun, accelerate or srun.

torchrun and the launchers built on it describe the processes in RANK, WORLD_SIZE, ...; the variables of a SLURM step
are translated into these. Nothing else reads them, except torch itself. Imports no torch.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clpet.errors import ConfigError

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch needs to connect ranks
EXIT_INPUT = 2  # exit code of wrong input, which all processes of a run notice alike


@dataclass(frozen=True)
class StartedRanks:
    """This process and the others that its launcher has started: they are the ranks of one run."""

    launcher: str  # for messages
    rank: int
    size: int
    local_rank: int  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Whether this process prints."""
        return self.rank == 0

    def check(self, ranks: int | str, is_set: bool) -> None:
        """Raises ConfigError if hardware.ranks contradicts the launcher; a default counts as auto."""
        if is_set and ranks not in ("auto", self.size):
            raise ConfigError(
                f"hardware.ranks={ranks}, but {self.launcher} has started {self.size} processes: leave it out, or set "
                f"hardware.ranks=auto or {self.size}"
            )


_muted: StartedRanks | None = None  # this process, while it prints nothing


def started_ranks(environ: Mapping[str, str] = os.environ) -> StartedRanks | None:
    """The processes that a launcher has started, with this one among them; None for a process by itself.

    Raises ConfigError for variables that name several processes, but not how to connect them.
    """
    if _only_slurm(environ):
        tasks = _count(environ, "SLURM_STEP_NUM_TASKS")
        rank, local_rank = _count(environ, "SLURM_PROCID"), _count(environ, "SLURM_LOCALID")
        return StartedRanks("srun", rank, tasks, local_rank)
    size = _count(environ, "WORLD_SIZE")
    if size <= 1:  # also torchrun with one process: a run like any other
        return None
    missing = [name for name in RENDEZVOUS if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE={size}, but not {', '.join(missing)}: start the processes with torchrun, "
            "or unset WORLD_SIZE and RANK for a run of one process"
        )
    rank = _count(environ, "RANK")
    if rank >= size:
        raise ConfigError(f"the environment has RANK={rank} and WORLD_SIZE={size}: ranks are counted from 0")
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "the launcher (WORLD_SIZE)"
    return StartedRanks(launcher, rank, size, _count(environ, "LOCAL_RANK"))


def is_spare() -> bool:
    """Whether a command that needs one process alone has nothing to do in this one: another one carries it out."""
    with contextlib.suppress(ConfigError):
        ranks = started_ranks()
        return ranks is not None and not ranks.is_main
    return False


def _only_slurm(environ: Mapping[str, str]) -> bool:
    """Whether srun has started several processes, and no other launcher in its place."""
    return not environ.keys() >= {"RANK", "WORLD_SIZE"} and _count(environ, "SLURM_STEP_NUM_TASKS") > 1


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "") or "0"
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text}, which is not a number")
    return int(text)


def rank_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables with which torch connects the ranks, where `started_ranks` has found several."""
    if _only_slurm(environ):
        return slurm_variables(environ)
    local_size = environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])
    return {"LOCAL_WORLD_SIZE": local_size, **{name: environ[name] for name in RENDEZVOUS}}


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The same for a process that srun has started: its rank, and the main rank's address."""
    nodes, host = int(environ.get("SLURM_STEP_NUM_NODES", "1")), "127.0.0.1"
    if nodes > 1:
        command = ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]]
        host = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    step = f"{environ['SLURM_JOB_ID']}{environ.get('SLURM_STEP_ID', '')}"
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(-(-tasks // nodes)),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(20000 + int(step) % 20000),  # the same on every rank, and another one for another step
    }


def mute(ranks: StartedRanks) -> None:
    """Makes a process that is not the main one print nothing: the main one prints for all."""
    global _muted
    if not ranks.is_main:
        _muted = ranks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)


def unmute() -> None:
    """Lets this process print an error that is its own."""
    global _muted
    if _muted:
        _muted, sys.stdout, sys.stderr = None, sys.__stdout__, sys.__stderr__


def report_error(message: str, code: int) -> None:
    """Prepares the report of an error before the ranks are connected; torchrun's own summary then shows its message.

    Wrong input is the same in every process, so the main one prints it; any other error on the first one of a machine.
    """
    if _muted and _muted.local_rank == 0 and code != EXIT_INPUT:
        unmute()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": report}))
