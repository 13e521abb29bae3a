"""Experience replay: sequential fine-tuning on new data mixed with old (EMR's loss in ConPET, section 3.3)."""

from dataclasses import dataclass
from typing import ClassVar

from clpet.errors import ConfigError
from clpet.methods.base import Method


@dataclass
class Replay(Method):
    """What is kept and how it is mixed is the `replay` group's choice: dynamic, fixed, reservoir or all."""

    uses_replay: ClassVar[bool] = True

    def check(self, objective: str, replay: str, peft: str) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError("method=replay needs a memory: replay=dynamic, fixed, reservoir or all")
