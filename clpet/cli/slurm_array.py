"""What a sweep still has to run, and its hardware's sbatch flags: for scripts/slurm_array.sh. Imports no torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clpet.cli.options import check_group_options, split_flags
from clpet.config.compose import conf_dir, plugin_dirs
from clpet.config.identity import digest, register_resolvers

# sbatch's names of what hydra.launcher calls otherwise; all other knobs that sbatch knows are called the same.
SBATCH = {"name": "job-name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks-per-node"}
SUBMITIT = ("_target_", "submitit_folder", "stderr_to_stdout", "max_num_timeout", "signal_delay_s",
            "array_parallelism", "additional_parameters", "setup")  # fmt: skip


def plan(words: list[str]) -> list[str]:
    """[file, sbatch flag, ...]: a line of the file holds an unfinished run's words, quoted; [] when all are done."""
    cfg, runs = _expand(words)
    folders = [f"--config-dir={folder}" for folder in plugin_dirs()]
    lines = {
        directory: shlex.join([*folders, *overrides])
        for directory, overrides, fresh in runs
        if fresh or not (directory / "results.json").exists()
    }
    if not lines:
        return []
    text = "".join(f"{line}\n" for line in lines.values())
    place = Path(cfg.output_dir, ".slurm", f"array-{digest(text)}.txt").absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():  # an array that waits may read it
        place.write_text(text)
    return [str(place), *sbatch_flags(cfg.hydra.launcher, len(lines))]


def _expand(words: list[str]) -> tuple[Any, list[tuple[Path, list[str], bool]]]:
    """The sweep's config, and (run directory, overrides, whether it starts over) of each of its runs, as Hydra would.

    Hydra's own sweeper is set up and asked to sweep; only the launcher is another one, which writes down what it
    is told to launch.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    register_resolvers()
    paths = create_config_search_path(str(conf_dir()))
    for folder in plugin_dirs():
        paths.prepend("command-line", f"file://{folder}", "schema")
    hydra = Hydra.create_main_hydra2("train", paths)
    cfg = hydra.compose_config("train", words, RunMode.MULTIRUN, with_log_configuration=False)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
    sweeper: Any = Plugins.instance().instantiate_sweeper(
        config=cfg, hydra_context=context, task_function=lambda _: None
    )
    sweeper.launcher = _Notes()
    sweeper.sweep(list(cfg.hydra.overrides.task))
    runs = []
    for overrides in sweeper.launcher.launched:
        one = hydra.config_loader.load_sweep_config(cfg, overrides)
        runs.append((Path(one.hydra.sweep.dir, one.hydra.sweep.subdir), overrides, bool(one.fresh)))
    return cfg, runs


class _Notes:
    """In a launcher's place: keeps the overrides of every run, and runs none."""

    def __init__(self) -> None:
        self.launched: list[list[str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        self.launched += [list(overrides) for overrides in job_overrides]
        return []


def sbatch_flags(launcher: Any, runs: int) -> list[str]:
    """The flags of an array of `runs` tasks; resources only where the hardware option is one for SLURM."""
    if "SlurmLauncher" not in launcher._target_:
        return [f"--array=0-{runs - 1}"]
    found = {SBATCH.get(key, key): value for key, value in launcher.items() if key not in SUBMITIT}
    found |= {"array": f"0-{runs - 1}%{launcher.array_parallelism}", "signal": f"B:USR2@{launcher.signal_delay_s}"}
    if launcher.mem_gb is not None:
        found["mem"] = f"{launcher.mem_gb}G"
    found |= launcher.additional_parameters
    flags = [(f"--{key.replace('_', '-')}", value) for key, value in found.items() if value not in (None, False)]
    return [flag if value is True else f"{flag}={value}" for flag, value in flags]


def sweep(argv: list[str]) -> int:
    """`clpet sweep key=value,value ...`: what scripts/slurm_array.sh asks before it submits."""
    overrides = split_flags(argv)[1]
    check_group_options(overrides)
    print("\n".join(plan(overrides)))
    return 0
