"""Runs that are submitted as SLURM jobs: what the waiting command prints. Imports no torch."""

import logging
from collections.abc import Sequence

from clpet.cli.slurm_array import expand
from clpet.cli.sweep_screen import SweepRun, SweepScreen, expand_sweep
from clpet.errors import DataError
from clpet.runtime.untrusted_json import read_results

log = logging.getLogger(__name__)


class SubmittedSweep:
    """The runs that Hydra's launcher submits and waits for; `overrides` are the words of the command line."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = list(overrides)
        cfg, self.runs = expand(self.overrides)
        self.output_dir = str(cfg.output_dir)
        self.logs = str(cfg.hydra.launcher.get("submitit_folder", self.output_dir)).partition("/%j")[0]

    def start(self) -> None:
        """Prints how many runs are submitted, and where their output goes; replaces submitit's repeated warning."""
        logging.getLogger("submitit").addFilter(_first_failure_of_sacct)
        count = "1 run as a SLURM job" if len(self.runs) == 1 else f"sweep of {len(self.runs)} runs as SLURM jobs"
        print(f"{count}; output in {self.logs}", flush=True)

    def closing(self) -> str:
        """The table of the runs, with those that have no results as failed; '' if none has begun."""
        if not any((out / "run.json").exists() for out, *_ in self.runs):
            return ""
        screen = SweepScreen(len(self.runs), self.output_dir)
        _, keys = expand_sweep(self.overrides)
        for number, (out, words, _) in enumerate(self.runs, 1):
            varied = [word for word in words if word.partition("=")[0] in keys]
            seconds, error = 0.0, None
            try:
                cost = read_results(out / "results.json")["cost"]
                seconds = sum(task["seconds"] + task.get("evaluation_seconds", 0) for task in cost)
            except (DataError, OSError, TypeError):
                error = "no results"
            screen.runs.append(SweepRun(number, varied, out, seconds, error))
        return screen.closing()


def _first_failure_of_sacct(record: logging.LogRecord) -> bool:
    """A filter that replaces submitit's warning at every failure of sacct with one, and ends the calls of sacct.

    Its states only tell submitit early of a job that has ended without a result; results are read from files.
    """
    if "sacct error" not in record.getMessage():
        return True
    from submitit import SlurmJob

    SlurmJob.watcher._make_command = lambda: None  # type: ignore[method-assign]  # sacct also prints an error itself
    log.warning(
        "this cluster has no accounting (sacct fails): a job that ends without a result is not noticed; "
        "squeue lists the jobs that are left"
    )
    return False
