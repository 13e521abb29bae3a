"""Reads the test texts of recorded runs again, for the mistakes in a report. Imports no torch."""

import logging
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from clpet.config.build import build, find_class, parse_config
from clpet.data.sources.base import Source
from clpet.errors import ClpetError, ConfigError
from clpet.escape import inline
from clpet.records import Results
from clpet.runs.run_record import cache_dir, read_run_json
from clpet.runtime.untrusted_json import as_data_error, split_of

log = logging.getLogger(__name__)


class RecordedTexts:
    """The test texts of runs by row number; the data of runs with equal test sets are read once.

    Only local data are read, and only texts whose hash is the recorded one are returned: those of another version
    would not belong to the answers, and a run directory from somebody else could name any file of this machine.
    """

    def __init__(self) -> None:
        self.texts: dict[tuple[tuple[str, str], ...], Mapping[int, str]] = {}

    def __call__(self, path: Path, run: Results) -> Mapping[int, str]:
        """{row number: text}; empty where the data cannot be read or are others, with the reason as a warning."""
        key = tuple(sorted(run.get("test_sets", {}).items()))
        if key and key not in self.texts:
            try:
                self.texts[key] = read_texts(path, run)
            except (ClpetError, OSError) as error:
                log.warning("%s", inline(f"the mistakes of {path} are shown without their texts: {error}"))
                self.texts[key] = {}
        return self.texts.get(key, {})


def read_texts(path: Path, run: Results) -> Mapping[int, str]:
    """{row number: text} of a run's test examples. Raises ClpetError and OSError."""
    node = read_run_json(path)["config"]
    with as_data_error(f"{path / 'run.json'} does not describe a run"):
        config = parse_config(OmegaConf.create(node))
        if not issubclass(find_class(str(config.benchmark["_target_"]), "benchmark"), Source):
            raise ConfigError("benchmark._target_ does not name a source of data")
        if config.benchmark.get("hub") and not config.data_dir:
            raise ConfigError("their data come from a hub")
        source: Source = build(config.benchmark, "benchmark", cache_dir=cache_dir(path))
        benchmark, split = source.load(config.data_dir), split_of(run)
    if benchmark.fingerprints(split) != run.get("test_sets"):
        raise ConfigError("the data have changed since")
    texts = (example.text for task in benchmark.tasks for example in task.split(split))
    return dict(enumerate(texts))
