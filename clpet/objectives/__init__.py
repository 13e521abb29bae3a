"""Training objectives: what the model is trained to do. `load` builds the one of a configuration with its examples."""

from typing import TYPE_CHECKING

from clpet.config.build import build
from clpet.config.schema import Config

if TYPE_CHECKING:
    from clpet.data.sources import Source
    from clpet.objectives.base import Objective


def load(config: Config, cache_dir: str | None) -> "tuple[Objective, Source]":
    """The objective of a configuration, not yet set up, and the source of its examples. Raises ConfigError."""
    objective: Objective = build(config.objective, "objective")
    source: Source = build(config.benchmark, "benchmark", cache_dir=cache_dir)
    return objective, source.reading_for(objective.name, objective.traits, objective.extra_columns)
