"""`clpet train`: Hydra composes the configuration of every run, and each run is started."""

import atexit
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.cli.error_messages import format_error, print_error
from clpet.cli.options import check_group_options, normalize_argv, split_flags
from clpet.errors import ConfigError
from clpet.escape import inline, printable
from clpet.records import FAILURE
from clpet.runtime.launchers import mute, started_ranks

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from clpet.cli.parallel_runs import ParallelSweep
    from clpet.cli.sweep_screen import SweepScreen

SHOWS_ONLY = ("--cfg", "-c", "--info", "-i", "-h", "--help", "--hydra-help", "--version", "-sc")  # Hydra's flags


@contextlib.contextmanager
def garbage_ignored() -> Iterator[None]:
    """Collects no garbage in the block, and afterwards looks for none among what the first block has imported.

    torch, transformers and peft create a million objects that stay. To look through them again and again takes a sixth
    of the import.
    """
    first, enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        if enabled:
            gc.enable()


def train(argv: list[str]) -> int:
    """`clpet train`: composes the configuration with Hydra and starts every run. Returns the exit code."""
    import hydra  # Hydra and OmegaConf stay out of `clpet --help` and `clpet list`

    from clpet.cli.parallel_runs import ParallelSweep
    from clpet.cli.submitted_sweep import SubmittedSweep
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers

    if ranks := started_ranks():
        mute(ranks)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises exceptions, and main_with_errors prints one line
    register_resolvers()
    arguments = normalize_argv(argv)
    if ranks and not ranks.is_main:
        arguments.append("hydra.output_subdir=null")  # the main process records the options
    check_group_options(arguments)
    command = TrainCommand(arguments, ParallelSweep(split_flags(argv)[0]))
    sys.argv = ["clpet train", *arguments]  # Hydra parses sys.argv itself
    if ranks and (submits(arguments) or not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)):
        raise ConfigError(
            f"{ranks.launcher} has started {ranks.size} processes of one run, not of a sweep or a submission: start "
            f"clpet train by itself, with hardware.ranks={ranks.size} for every run, or start the runs one by one"
        )
    submitted = SubmittedSweep(split_flags(argv)[1]) if submits(arguments) else None
    if submitted:
        submitted.start()
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(command.run_job)()
    finally:
        if submitted and (closing := submitted.closing()):
            print(closing, flush=True)
    return command.finish()


def submits(arguments: Sequence[str]) -> bool:
    """Whether the words of a command line name a SLURM option, whose runs are jobs that this process waits for."""
    if any(word.partition("=")[0] in SHOWS_ONLY for word in arguments):
        return False
    return any(word.startswith(("hardware=", "hydra/launcher=")) and "slurm" in word for word in arguments)


@dataclass
class TrainCommand:
    """One `clpet train`: a run, or the runs of a sweep. A failing run does not stop the other runs of a sweep."""

    arguments: list[str]
    parallel: "ParallelSweep"
    screen: "SweepScreen | None" = None  # of a sweep on this machine
    failures: list[tuple[str, str, int]] = field(default_factory=list)  # varied options, message, exit code
    dry_runs: list[tuple[list[str], Path]] = field(default_factory=list)  # of a sweep: varied options, folder

    def run_job(self, cfg: "DictConfig") -> float | None:
        """Runs one configuration; returns the score that a Hydra sweeper optimises."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra = HydraConfig.get()
        submitted = hydra.mode is RunMode.MULTIRUN and "BasicLauncher" not in hydra.launcher._target_
        exit_codes: list[int] = []
        if submitted:
            atexit.register(lambda: exit_codes and os._exit(exit_codes[0]))
        elif hydra.mode is RunMode.MULTIRUN:
            self._follow_sweep(cfg, hydra)
        varied = self._varied(hydra.overrides.task) if hydra.mode is RunMode.MULTIRUN else []
        start, out, message = time.monotonic(), Path(hydra.runtime.output_dir), None
        if cfg.dry_run and varied:
            self.dry_runs.append((varied, out))
            (out / "estimate.json").unlink(missing_ok=True)
        try:
            score = self._launch(cfg, hydra, varied, out)
        except Exception as error:
            if submitted:  # submitit returns the error to the waiting process; the exit code makes the job fail too
                exit_codes.append(getattr(error, "exit_code", 1))
                raise
            message, code = format_error(error)
            record_failure(out, message)
            self.failures.append((" ".join(varied), message, code))
            score = None
        if self.screen and not self.parallel.jobs:
            from clpet.cli.sweep_screen import SweepRun

            self.screen.finished(SweepRun(hydra.job.num + 1, varied, out, time.monotonic() - start, message))
        return score

    def _varied(self, words: Sequence[str]) -> list[str]:
        """The words of a run that differ between the runs of the sweep."""
        from clpet.cli.sweep_screen import expand_sweep

        _, keys = expand_sweep(self.arguments)
        return [word for word in words if word.partition("=")[0] in keys]

    def _launch(self, cfg: "DictConfig", hydra: "HydraConf", varied: list[str], out: Path) -> float | None:
        from clpet.config.build import parse_config

        parse_config(cfg)  # reports a wrong value before the import of torch takes seconds
        if self.parallel.takes(cfg, hydra, varied):
            return None
        ranks = started_ranks()
        if not self.screen and (ranks is None or ranks.is_main):
            what = f"{cfg.method.name} on {cfg.benchmark.name} with {cfg.model.name}, seed {cfg.seed}"
            print(f"starting {inline(what)}", flush=True)  # the imports take seconds
        with garbage_ignored():
            from clpet.cli.launch import launch
        from clpet.reporting.run_metrics import outcome

        finished = launch(cfg, out, list(hydra.overrides.task), quiet=self.screen is not None) is not None
        return outcome(out) if finished and (ranks is None or ranks.is_main) else None

    def _follow_sweep(self, cfg: "DictConfig", hydra: "HydraConf") -> None:
        """Prints the runs of a sweep of several as one line each, and a warning that all of them repeat once."""
        from clpet.cli.sweep_screen import SweepScreen, expand_sweep

        if self.screen is None and not cfg.dry_run and "BasicSweeper" in hydra.sweeper._target_:
            total, _ = expand_sweep(self.arguments)
            if total > 1:
                self.screen = SweepScreen(total, str(cfg.output_dir))
                self.screen.start()
        for handler in logging.getLogger().handlers if self.screen else ():
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(self.screen.print_once)  # type: ignore[union-attr]

    def _estimates(self) -> str:
        """The table of what the runs of a sweep will need, after a dry run of each."""
        from clpet.reporting import estimates

        estimated = [(varied, estimates.read(out) if (out / estimates.FILE).is_file() else None)
                 for varied, out in self.dry_runs]  # fmt: skip
        return "\n" + printable(estimates.sweep_table(estimated))

    def finish(self) -> int:
        """Carries out parallel runs, prints the closing table and the failures; returns the highest exit code."""
        for varied, error in self.parallel.run(self.screen):
            self.failures.append((varied, *format_error(error)))
        if self.screen:
            print(self.screen.closing(), flush=True)
        if self.dry_runs:
            print(self._estimates(), flush=True)
        codes = [
            print_error(f"{varied}: {message}" if varied else message, code) for varied, message, code in self.failures
        ]
        return max(codes, default=0)


def record_failure(out: Path, message: str) -> None:
    """Writes the error of a run into its train.log, and into failed.json if the run had begun."""
    record = logging.LogRecord("clpet", logging.ERROR, "", 0, inline(message), None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
    if (out / "run.json").is_file() and not (out / "results.json").is_file():
        (out / FAILURE).write_text(json.dumps({"error": message}))
