"""Block expansion: a decoder gets copies of some of its blocks, which change nothing until they are trained."""

import copy
from typing import Any

from torch import nn

from clpet.errors import ModelError

# What a block adds to its input passes through these two layers, last: with both at zero it adds nothing.
OUTPUTS = (
    ("self_attn.o_proj", "mlp.down_proj"),  # LLaMA, Mistral, Qwen
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
)


def expand(model: Any, every: int) -> list[nn.Module]:
    """Puts a copy behind every `every`-th block; the copies. Raises ModelError for blocks it does not know."""
    config = model.config
    old = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers), None
    )
    outputs = next((names for names in OUTPUTS if old and all(_has(old[0], name) for name in names)), None)
    if old is None or outputs is None:
        raise ModelError(f"peft=blocks knows the blocks of LLaMA, GPT-2 and GPT-NeoX, not those of {config.model_type}")
    if every > len(old):
        raise ModelError(f"peft.every={every}, but the model has {len(old)} blocks: at most that")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            "peft=blocks does not go with scale_attn_by_inverse_layer_idx: a block's place changes its values"
        )
    new, made = nn.ModuleList(), []
    for number, block in enumerate(old, 1):
        new.append(block)
        if number % every == 0:
            made.append(_silent(block, outputs))
            new.append(made[-1])
    for number, block in enumerate(new):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where a cache of keys and values keeps its part
                module.layer_idx = number  # type: ignore[assignment]
    parent, name = next((p, n) for p in model.modules() for n, child in p.named_children() if child is old)
    setattr(parent, name, new)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(old) and key != "architectures":  # an entry per block
            setattr(config, key, [v for number, v in enumerate(value, 1) for v in [v] * (1 + (number % every == 0))])
    config.num_hidden_layers = len(new)
    return made


def _silent(block: nn.Module, outputs: tuple[str, str]) -> nn.Module:
    """A copy that adds nothing to its input."""
    made = copy.deepcopy(block)
    for name in outputs:
        for parameter in made.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return made


def _has(block: nn.Module, name: str) -> bool:
    try:
        return bool(block.get_submodule(name))
    except AttributeError:
        return False
