"""Tokens that a vocabulary lacks: their embeddings, which are trained while those of all other tokens stay."""

import torch
from torch import Tensor, nn

from clpet.config.seeding import derive
from clpet.methods.components.features import vocabulary
from clpet.models.protocols import network_of


class NewTokens:
    """The ids `first`, `first` + 1, ... behind the rows of the embedding, with a trained vector [dim] each.

    A vector is the input embedding of its token and, as in a network with tied embeddings, its row in the output layer,
    whose logits have that many more columns. The vectors are added by hooks: the network and its checkpoints stay as
    they are. `rows` [count, dim] is fp32 and starts as the embeddings of different random tokens.
    """

    def __init__(self, model: nn.Module, count: int, seed: int) -> None:
        network, weight = network_of(model), vocabulary(model)
        self.first = len(weight)
        generator = torch.Generator().manual_seed(derive(seed, "new_tokens"))
        drawn = torch.randperm(self.first, generator=generator)[:count].to(weight.device)
        self.rows = nn.Parameter(weight.detach()[drawn].float())
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.weight is weight:
                module.register_forward_pre_hook(self.before_embedding)
                module.register_forward_hook(self.after_embedding)
        network.get_output_embeddings().register_forward_hook(self.after_output)

    def before_embedding(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Remembers the token ids, and replaces the new ones by an old one."""
        self.ids = inputs[0]
        return (self.ids.masked_fill(self.ids >= self.first, 0),)

    def after_embedding(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The embeddings, with the trained vectors at the new tokens."""
        index = (self.ids - self.first).clamp(min=0)
        return torch.where((self.ids >= self.first)[..., None], self.rows.to(output.dtype)[index], output)

    def after_output(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The logits, with a column for every new token."""
        return torch.cat([output, inputs[0] @ self.rows.to(inputs[0].dtype).mT], -1)
