"""`extend=RUN` on a command line: the settings are those of RUN, as if its words stood there, too. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from clpet.config.compose import plugin_dirs
from clpet.config.identity import TASK_OPTIONS
from clpet.config.overrides import expand_override, path_value
from clpet.errors import ConfigError, DataError
from clpet.runs.run_record import read_run_json

WORD = re.compile(r"\+{0,2}([\w.@/]+)=")  # KEY=VALUE
# Not taken over: where files are written or sent, what Hydra itself does, and what decides which code is run.
NOT_TAKEN = ("hydra", "tracking", "output_dir", "cache_dir", "extend", "fresh", "dry_run", "model.trust_remote_code")
AUTOMATIC = ("auto", "off")  # values of `extend` that name no run


def with_settings_of_run(words: Sequence[str]) -> list[str]:
    """The overrides of a command line; with extend=RUN those of RUN come first, unless the line has the same option.

    The output folder is the one that RUN is in. Whether the settings still are those of RUN is checked later, against
    its recorded configuration. Raises ConfigError and DataError.
    """
    values = [value for key, value in map(_split, words) if key == "extend"]
    if not values or values[-1] in AUTOMATIC:
        return list(words)
    value = values[-1].strip("'\"")
    if "," in value and not Path(value).is_dir():
        raise ConfigError(
            "extend=RUN names one run; to extend several, sweep over their settings with the longer tasks"
        )
    base, given = Path(value).expanduser(), {key for key, _ in map(_split, words)}
    if not given.intersection(f"benchmark.{option}" for option in TASK_OPTIONS):
        raise ConfigError(f"extend={value} needs the tasks of both runs: tasks=[old, ..., new]")
    recorded = read_run_json(base, plugins=bool(plugin_dirs())).get("overrides", [])
    if not isinstance(recorded, list):
        raise DataError(f"{base / 'run.json'} does not describe a run: its overrides are not a list")
    # An interpolation could read the environment.
    plain = [word for word in recorded if isinstance(word, str) and WORD.match(word) and "${" not in word]
    taken = [expand_override(word) for word in plain]
    taken = [word for word in taken if _split(word)[0] not in given and not _split(word)[0].startswith(NOT_TAKEN)]
    root = base.resolve().parents[2:3]
    if "output_dir" not in given and root:
        taken.append(f"output_dir={path_value(str(root[0]))}")
    return [*taken, *words]


def _split(word: str) -> tuple[str, str]:
    """(key without + or ~, value) of an override."""
    key, _, value = word.partition("=")
    return key.lstrip("+~"), value
