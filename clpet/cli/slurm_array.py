"""The unfinished runs of a sweep and the sbatch flags of its hardware, for scripts/slurm_array.sh. Imports no torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpet.cli.options import check_group_options, split_flags
from clpet.config.compose import conf_dir, plugin_dirs
from clpet.config.identity import digest, register_resolvers

if TYPE_CHECKING:
    from omegaconf import DictConfig

# hydra.launcher option -> sbatch flag where the names differ.
SBATCH_NAMES = {"name": "job-name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks-per-node"}
# hydra.launcher options that are not sbatch flags.
NOT_SBATCH = ("_target_", "submitit_folder", "stderr_to_stdout", "max_num_timeout", "signal_delay_s",
            "array_parallelism", "additional_parameters", "setup")  # fmt: skip


def plan(words: list[str]) -> list[str]:
    """[file, sbatch flag, ...] of a sweep, [] if all its runs are finished.

    Each line of the file has the overrides of one unfinished run, quoted for a shell.
    """
    cfg, runs = expand(words)
    folders = [f"--config-dir={folder}" for folder in plugin_dirs()]
    lines = {
        directory: shlex.join([*folders, *overrides])
        for directory, overrides, fresh in runs
        if fresh or not (directory / "results.json").exists()
    }
    if not lines:
        return []
    text = "".join(f"{line}\n" for line in lines.values())
    path = Path(cfg.output_dir, ".slurm", f"array-{digest(text)}.txt").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # a queued array of the same runs may be about to read it
        path.write_text(text)
    return [str(path), *sbatch_flags(cfg.hydra.launcher, len(lines))]


def expand(words: list[str]) -> "tuple[DictConfig, list[tuple[Path, list[str], bool]]]":
    """The sweep's configuration, and (run directory, overrides, fresh) of each of its runs.

    Hydra's own sweeper expands the sweep, with a launcher that records the runs instead of launching them.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    register_resolvers()
    search_path = create_config_search_path(str(conf_dir()))
    for folder in plugin_dirs():
        search_path.prepend("command-line", f"file://{folder}", "schema")
    hydra = Hydra.create_main_hydra2("train", search_path)
    cfg = hydra.compose_config("train", words, RunMode.MULTIRUN, with_log_configuration=False)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
    sweeper: Any = Plugins.instance().instantiate_sweeper(
        config=cfg, hydra_context=context, task_function=lambda _: None
    )
    sweeper.launcher = _RecordingLauncher()
    sweeper.sweep(list(cfg.hydra.overrides.task))
    runs = []
    for overrides in sweeper.launcher.recorded:
        run_cfg = hydra.config_loader.load_sweep_config(cfg, overrides)
        directory = Path(run_cfg.hydra.sweep.dir, run_cfg.hydra.sweep.subdir)
        runs.append((directory, overrides, bool(run_cfg.fresh)))
    GlobalHydra.instance().clear()  # `clpet train` initialises Hydra again
    return cfg, runs


class _RecordingLauncher:
    """Takes the place of Hydra's launcher: records the overrides of every run, and starts none."""

    def __init__(self) -> None:
        self.recorded: list[list[str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[object]:
        self.recorded += [list(overrides) for overrides in job_overrides]
        return []


def sbatch_flags(launcher: "DictConfig", num_runs: int) -> list[str]:
    """The sbatch flags of an array; resources only if the hardware option is one for SLURM."""
    if "SlurmLauncher" not in launcher._target_:
        return [f"--array=0-{num_runs - 1}"]
    values = {SBATCH_NAMES.get(str(key), str(key)): value for key, value in launcher.items() if key not in NOT_SBATCH}
    values |= {"array": f"0-{num_runs - 1}%{launcher.array_parallelism}", "signal": f"B:USR2@{launcher.signal_delay_s}"}
    if launcher.mem_gb is not None:
        values["mem"] = f"{launcher.mem_gb}G"
    values |= launcher.additional_parameters
    flags = [(f"--{key.replace('_', '-')}", value) for key, value in values.items() if value not in (None, False)]
    return [flag if value is True else f"{flag}={value}" for flag, value in flags]


def sweep(argv: list[str]) -> int:
    """`clpet sweep key=value,value ...`: prints the plan that scripts/slurm_array.sh submits."""
    _, overrides = split_flags(argv)
    check_group_options(overrides)
    print("\n".join(plan(overrides)))
    return 0
