"""`clpet train`: composes with Hydra and runs."""

import atexit
import os
import sys
from pathlib import Path
from typing import Any

from clpet.cli.error_messages import format_error, print_error
from clpet.cli.options import check_group_options, normalize_argv, split_flags
from clpet.escape import inline


def train(argv: list[str]) -> int:
    """`clpet train`: composes with Hydra and runs."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from clpet.cli.parallel_runs import ParallelSweep
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach `main_with_errors`, which prints one line
    register_resolvers()
    arguments = normalize_argv(argv)
    check_group_options(arguments)

    failures: list[tuple[str, Exception]] = []
    parallel = ParallelSweep(split_flags(argv)[0])

    def job(cfg: Any) -> float | None:
        from clpet.config.build import parse_config

        found = HydraConfig.get()
        submitted = found.mode is RunMode.MULTIRUN and "BasicLauncher" not in found.launcher._target_
        code: list[int] = []
        if submitted:
            atexit.register(lambda: code and os._exit(code[0]))
        own = " ".join(word for word in found.overrides.task if word not in arguments)  # what the sweep varies
        try:
            parse_config(cfg)  # a mistake in a value is told before what takes seconds to import
            if parallel.takes(cfg, found, own):
                return None
            if own and not submitted:
                print(f"\n[{found.job.num + 1}] {inline(own)}\n", flush=True)
            from clpet.cli.launch import launch
            from clpet.reporting.figures import outcome

            out = Path(found.runtime.output_dir)
            finished = launch(cfg, out, list(found.overrides.task)) is not None
        except Exception as error:
            if submitted:  # the launcher carries the error home as an answer: the job has to fail by itself
                code.append(getattr(error, "exit_code", 1))
                raise
            failures.append((own, error))  # the other runs of a sweep go on
            return None
        return outcome(out) if finished else None

    sys.argv = ["clpet train", *arguments]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(job)()
    return _report([*failures, *parallel.run()])


def _report(failures: list[tuple[str, Exception]]) -> int:
    """Prints a line for every run that failed; the exit code of all."""
    codes = []
    for own, error in failures:
        message, code = format_error(error)
        codes.append(print_error(f"{own}: {message}" if own else message, code))
    return max(codes, default=0)
