"""Fitting a large backbone: recomputed activations, 4-bit weights, and the blocks that sharding divides."""

from collections.abc import Callable

import torch
from torch import nn

from clpet.errors import ModelError


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network. Raises ModelError if transformers does not mark any module as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            "hardware.shard, compile and gradient_checkpointing need a model whose blocks transformers marks"
        )
    return blocks


def enable_recomputation(model: nn.Module, uses_dropout: bool) -> None:
    """Gradient checkpointing: activations inside blocks are recomputed in the backward pass (Chen et al., 2016).

    transformers recomputes only in blocks that are in training mode. Unless the network uses dropout, the rates stored
    in a block are therefore set to 0; if it does, the second pass draws the same masks as the first.
    """
    blocks = transformer_blocks(model)
    for block in () if uses_dropout else blocks:
        for name, value in vars(block).items():
            if "dropout" in name and isinstance(value, float):
                setattr(block, name, 0.0)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of new and of older transformers
    enable: Callable[[dict[str, bool]], object] = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def sharded_units(model: nn.Module, trained: bool) -> list[str]:
    """Names of the modules whose weights are gathered one after the other; the rest is gathered together.

    In a `trained` network these are also the layers that are called outside of its forward pass.
    """
    blocks = set(transformer_blocks(model))
    if trained:
        blocks |= {module for module in (getattr(model, "pooler", None),) if isinstance(module, nn.Module)}
    return [name for name, module in model.named_modules() if module in blocks]


def nf4_arguments(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of from_pretrained for NF4 weights with doubly quantised scales that compute in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}
