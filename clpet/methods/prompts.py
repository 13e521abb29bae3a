"""Base of prompt methods: the backbone is frozen, and vectors prepended to the text's embeddings are learned."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch
from clpet.data.benchmark import Benchmark
from clpet.methods.base import Method
from clpet.methods.components.features import vocabulary


@dataclass
class Prompts(Method):
    """Subclasses return the prepended vectors in `prompt`; texts are cut to make room for them."""

    length: int = 10

    supported_pefts: ClassVar[tuple[str, ...]] = ("frozen",)
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.length >= 1, "method.length", self.length, "at least 1")

    def reserved_positions(self, benchmark: Benchmark) -> int:
        raise NotImplementedError

    def init_adapters(self) -> None:
        self.objective.prompt = self.prompt

    def prompt(self, batch: Batch) -> Tensor:
        """[batch, p, dim]: the vectors prepended to each text."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        raise NotImplementedError

    def from_vocabulary(self, count: int, *names: object) -> Tensor:
        """[count, dim] fp32: embeddings of random tokens, drawn from a stream of random numbers named by `names`."""
        weight = vocabulary(self.objective.adapters.model)
        generator = torch.Generator().manual_seed(derive(self.seed, "prompt", *names))
        return weight[torch.randint(len(weight), (count,), generator=generator).to(weight.device)].float()

    def save(self, folder: Path) -> None:
        """Writes the prompts as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, folder / "prompts.safetensors")
