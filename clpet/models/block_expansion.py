"""Block expansion (Wu et al., 2024, arXiv 2401.02415): a decoder gets copies of some of its blocks.

A copy is the identity until it is trained: the two layers through which it adds to the residual stream start at zero.
"""

import copy

from torch import nn

from clpet.errors import ModelError
from clpet.models.architectures import block_outputs
from clpet.models.protocols import NetworkConfig, config_of


def expand(model: nn.Module, every: int) -> list[nn.Module]:
    """Inserts a copy after every `every`-th block and returns the copies. Raises ModelError for unknown blocks."""
    config = config_of(model)
    old = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers), None
    )
    outputs = block_outputs(old[0]) if old else None
    if old is None or outputs is None:
        raise ModelError(f"peft=blocks supports LLaMA, GPT-2 and GPT-NeoX blocks, not those of {config.model_type}")
    if every > len(old):
        raise ModelError(f"peft.every={every}, but the model has only {len(old)} blocks")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            "peft=blocks does not work with scale_attn_by_inverse_layer_idx: a block's index changes its output"
        )
    new, copies = nn.ModuleList(), []
    for number, block in enumerate(old, 1):
        new.append(block)
        if number % every == 0:
            copies.append(_identity_copy(block, outputs))
            new.append(copies[-1])
    for index, block in enumerate(new):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the block's slot in the key-value cache; two blocks must not share one
                module.layer_idx = index  # type: ignore[assignment]
    parent, name = next((p, n) for p in model.modules() for n, child in p.named_children() if child is old)
    setattr(parent, name, new)
    _extend_block_lists(config, len(old), every)
    config.num_hidden_layers = len(new)
    return copies


def _extend_block_lists(config: NetworkConfig, blocks: int, every: int) -> None:
    """Repeats the entries of the copied blocks in lists with an entry per block, such as SmolLM3's no_rope_layers.

    The saved config otherwise does not describe the saved weights.
    """
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == blocks and key != "architectures":
            setattr(config, key, [v for number, v in enumerate(value, 1) for v in [v] * (1 + (number % every == 0))])


def _identity_copy(block: nn.Module, outputs: tuple[str, str]) -> nn.Module:
    """A copy of the block that adds zero to its input."""
    duplicate = copy.deepcopy(block)
    for name in outputs:
        for parameter in duplicate.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return duplicate
