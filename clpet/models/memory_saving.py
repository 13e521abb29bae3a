"""Fitting a large backbone: recomputed activations, sharded blocks, 4-bit weights."""

from typing import Any

import torch
from torch import nn

from clpet.errors import ModelError
from clpet.runtime.distributed import get_world


def blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks of a network. Raises ModelError where it has none that transformers knows as such."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError("hardware.shard and gradient_checkpointing need a model whose blocks transformers can name")
    return found


def recompute(model: Any, drops: bool) -> None:
    """Activations inside of blocks are computed again for the gradients instead of held (Chen et al., 2016).

    transformers does so only where a block is in training mode. Unless the network `drops`, the rates that a block
    itself holds are set to 0; where it does, the second pass draws what the first one drew.
    """
    found = blocks(model)
    for block in () if drops else found:
        for name, value in vars(block).items():
            if "dropout" in name and isinstance(value, float):
                setattr(block, name, 0.0)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def shard(model: nn.Module, device: torch.device) -> None:
    """Spreads the blocks of a frozen backbone on the host over the ranks (FSDP2); all else every rank holds whole.

    Adapters come later and stay whole: they are trained and saved as without. From now on the ranks pass through
    the backbone together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (get_world().size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)
    get_world().sharded = True


def four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained is told to hold weights as NF4 with doubly quantised scales, and to compute in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}
