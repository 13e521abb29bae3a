"""`clpet train`: Hydra composes the configuration of every run, and each run is started."""

import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.cli.error_messages import format_error, print_error
from clpet.cli.options import check_group_options, normalize_argv, split_flags
from clpet.escape import inline

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from clpet.cli.parallel_runs import ParallelSweep


def train(argv: list[str]) -> int:
    """`clpet train`: composes the configuration with Hydra and starts every run. Returns the exit code."""
    import hydra  # Hydra and OmegaConf stay out of `clpet --help` and `clpet list`

    from clpet.cli.parallel_runs import ParallelSweep
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises exceptions, and main_with_errors prints one line
    register_resolvers()
    arguments = normalize_argv(argv)
    check_group_options(arguments)

    failures: list[tuple[str, Exception]] = []
    parallel = ParallelSweep(split_flags(argv)[0])

    def job(cfg: "DictConfig") -> float | None:
        return _run_job(cfg, arguments, parallel, failures)

    sys.argv = ["clpet train", *arguments]  # Hydra parses sys.argv itself
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(job)()
    return _report([*failures, *parallel.run()])


def _run_job(
    cfg: "DictConfig", arguments: list[str], parallel: "ParallelSweep", failures: list[tuple[str, Exception]]
) -> float | None:
    """Runs one configuration; returns the score that a Hydra sweeper optimises.

    A failing run is added to `failures` and does not stop the other runs of a sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from clpet.config.build import parse_config

    hydra = HydraConfig.get()
    submitted = hydra.mode is RunMode.MULTIRUN and "BasicLauncher" not in hydra.launcher._target_
    exit_codes: list[int] = []
    if submitted:
        atexit.register(lambda: exit_codes and os._exit(exit_codes[0]))
    varied = " ".join(word for word in hydra.overrides.task if word not in arguments)  # what the sweep varies
    try:
        parse_config(cfg)  # reports a wrong value before the import of torch takes seconds
        if parallel.takes(cfg, hydra, varied):
            return None
        if varied and not submitted:
            print(f"\n[{hydra.job.num + 1}] {inline(varied)}\n", flush=True)
        from clpet.cli.launch import launch
        from clpet.reporting.run_metrics import outcome

        out = Path(hydra.runtime.output_dir)
        finished = launch(cfg, out, list(hydra.overrides.task)) is not None
    except Exception as error:
        if submitted:  # submitit returns the error to the waiting process; the exit code makes the SLURM job fail too
            exit_codes.append(getattr(error, "exit_code", 1))
            raise
        failures.append((varied, error))
        return None
    return outcome(out) if finished else None


def _report(failures: list[tuple[str, Exception]]) -> int:
    """Prints one line for every failed run; returns the highest exit code."""
    codes = []
    for varied, error in failures:
        message, code = format_error(error)
        codes.append(print_error(f"{varied}: {message}" if varied else message, code))
    return max(codes, default=0)
