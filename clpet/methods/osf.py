"""OSF: fine-tuning orthogonally to a layer's strongest singular directions (Nayak et al., 2025, arXiv 2504.07097).

peft=osf freezes the directions with large singular values and projects gradients out of them. It does not project
AdamW's steps, so that the protected directions still change a little. This method merges the result into the weights
after each task and decomposes them again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from peft.tuners.osf.layer import Linear as OSFLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.benchmark import Task
from clpet.errors import ModelError
from clpet.methods.base import Method
from clpet.records import State
from clpet.training.trainer import Trainer


@dataclass
class OSF(Method):
    """Directions that task t made strong are among the protected ones of task t + 1."""

    changes_backbone: ClassVar[bool] = True
    supported_pefts: ClassVar[tuple[str, ...]] = ("osf",)

    def init_adapters(self) -> None:
        super().init_adapters()
        self.index = 0  # of the current task
        if not self.layers():
            raise ModelError("peft=osf supports linear layers only, but peft.targets matches none: change peft.targets")

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.index = index
        if index > 0:
            self.objective.adapters.remove(merge=True)
            self.objective.adapters.add("default", derive(self.seed, "adapter", index))
        super().learn(task, index, trainer)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable singular values and vectors of the current task's decomposition, and the head."""
        adapter = self.objective.adapters.tensors("default")
        return {**{f"{self.index}.{name}": value for name, value in adapter.items()}, **self.objective.parameters()}

    def layers(self) -> dict[str, OSFLayer]:
        """The trained layers by their name in the backbone."""
        named = self.objective.adapters.model.named_modules()
        return {name.removeprefix("base_model.model."): m for name, m in named if isinstance(m, OSFLayer)}

    def weights(self) -> dict[str, nn.Parameter]:
        """Weights of the trained layers before the current task."""
        return {name: cast(nn.Parameter, layer.get_base_layer().weight) for name, layer in self.layers().items()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes the trained layers' weights as safetensors, named as in the backbone."""
        folder.mkdir(parents=True, exist_ok=True)
        layers, weights = self.layers(), self.weights()
        tensors = {name: (weights[name] + layer.get_delta_weight("default")).cpu() for name, layer in layers.items()}
        save_file({f"{name}.weight": value for name, value in tensors.items()}, folder / "weights.safetensors")

    def state_dict(self) -> State:
        return {**super().state_dict(), "weights": self.weights()}

    def load_state_dict(self, state: State) -> None:
        saved, adapters = cast(dict[str, Tensor], state["weights"]), self.objective.adapters
        with torch.no_grad():
            for name, weight in self.weights().items():
                weight.copy_(saved[name])
        adapters.remove(merge=False)
        adapters.add("default", 0)
        super().load_state_dict(state)
