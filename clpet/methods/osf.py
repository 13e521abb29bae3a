"""OSF: full fine-tuning outside of a layer's strongest singular directions (Nayak et al., 2025, arXiv 2504.07097).

peft=osf keeps the directions and projects the gradients (not AdamW's steps: the kept directions move a little);
here its result is merged after a task and decomposed anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.data.benchmark import Task
from clpet.errors import ModelError
from clpet.methods.base import Method
from clpet.training.trainer import Trainer


@dataclass
class OSF(Method):
    """What task t made strong is among the kept directions of task t + 1."""

    supported_pefts: ClassVar[tuple[str, ...]] = ("osf",)

    def init_adapters(self) -> None:
        super().init_adapters()
        self.index = 0  # of the task that is learned
        if not self.layers():
            raise ModelError("peft=osf fits linear layers only, and peft.targets names none")

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        self.index = index
        if index > 0:
            self.objective.adapters.remove(merge=True)
            self.objective.adapters.add("default", derive(self.seed, "adapter", index))
        super().learn(task, index, trainer)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Singular values and vectors of the decomposition made for this task, and the head."""
        adapter = self.objective.adapters.tensors("default")
        return {**{f"{self.index}.{name}": value for name, value in adapter.items()}, **self.objective.parameters()}

    def layers(self) -> dict[str, Any]:
        """The layers that are trained."""
        named = self.objective.adapters.model.named_modules()
        return {name.removeprefix("base_model.model."): m for name, m in named if hasattr(m, "osf_svd_params")}

    def weights(self) -> dict[str, nn.Parameter]:
        """Their weights before the present task."""
        return {name: layer.get_base_layer().weight for name, layer in self.layers().items()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes the trained layers' weights as safetensors, by their name in the backbone."""
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Tensor] = {}
        for name, layer in self.layers().items():
            found[f"{name}.weight"] = (layer.get_base_layer().weight + layer.get_delta_weight("default")).cpu()
        save_file(found, folder / "weights.safetensors")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weights": self.weights()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights, adapters = self.weights(), self.objective.adapters
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])
        adapters.remove(merge=False)
        adapters.add("default", 0)
        super().load_state_dict(state)
