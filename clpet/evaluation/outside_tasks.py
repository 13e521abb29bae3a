"""Tasks outside the sequence, named `benchmark/NAME` or `benchmark/NAME:TASK`: an option of benchmark=, or one task.

They are read with the options of their own YAML, from the data_dir of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from omegaconf import OmegaConf

from clpet.config.build import build
from clpet.config.compose import compose_config, conf_dir, plugin_dirs
from clpet.config.schema import Config
from clpet.data.benchmark import Benchmark
from clpet.data.sources.base import Source
from clpet.errors import ConfigError, suggest
from clpet.escape import safe_name, short_repr
from clpet.objectives.base import Objective
from clpet.records import Json

PREFIX = "benchmark/"


@dataclass(frozen=True)
class OutsideTasks:
    """A source of tasks that a run does not learn; `task` names one of them, '' stands for all."""

    source: Source
    task: str

    @classmethod
    def find(cls, word: str, option: str, config: Config, objective: Objective, *words: str) -> "OutsideTasks":
        """The source that `word`, a value of `option`, names; `words` set options of it. Raises ConfigError.

        Nothing is read yet.
        """
        name, _, task = word.removeprefix(PREFIX).partition(":")
        benchmarks = {file.stem for folder in (conf_dir(), *plugin_dirs()) for file in folder.glob("benchmark/*.yaml")}
        if not word.startswith(PREFIX) or name not in benchmarks:
            raise ConfigError(
                f"{option}={short_repr(word)} is not {PREFIX}NAME or {PREFIX}NAME:TASK"
                f"{suggest(name.removeprefix(PREFIX), sorted(benchmarks))}"
            )
        node = OmegaConf.to_container(compose_config([f"benchmark={name}", *words]).benchmark, resolve=True)
        source: Source = build(cast(Mapping[str, Json], node), f"{PREFIX}{name}", cache_dir=config.cache_dir)
        return cls(source.reading_for(objective.name, objective.traits, objective.extra_columns), task)

    def load(self, data_dir: str | None) -> Benchmark:
        """The benchmark with the named task, or with all. Raises ConfigError and DataError."""
        benchmark = self.source.load(data_dir)
        if not self.task:
            return benchmark
        tasks = [task for task in benchmark.tasks if task.name == self.task]
        if not tasks:
            raise ConfigError(
                f"{benchmark.name} has no task {safe_name(self.task)}{suggest(self.task, benchmark.names)}"
            )
        return replace(benchmark, tasks=tasks)
