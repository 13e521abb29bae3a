"""The options of the group `tracking`."""

from dataclasses import dataclass, field
from enum import Enum

from clpet.config.schema import require
from clpet.runs.trackers import TrackerName, check_installed


class Mode(Enum):
    """The mode of wandb: auto tries its server once and falls back to offline; off writes nothing for wandb."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class Tracking:
    """An option of the group `tracking`. Where an option is null or empty, wandb's variable of that name applies."""

    name: str = "auto"
    mode: Mode = Mode.auto
    project: str | None = None
    entity: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    artifacts: bool = False
    also: list[TrackerName] = field(default_factory=list)
    timeout: float = 10.0  # seconds to wait for the server at the start
    finish_timeout: float = 60.0  # seconds to wait for the last uploads at the end

    def __post_init__(self) -> None:
        require(self.timeout > 0, "tracking.timeout", self.timeout, "more than 0 seconds")
        require(self.finish_timeout > 0, "tracking.finish_timeout", self.finish_timeout, "more than 0 seconds")

    def check(self) -> None:
        """Raises ConfigError if the package of a tracker is missing."""
        check_installed(self.also)
