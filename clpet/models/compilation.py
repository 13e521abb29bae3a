"""Faster blocks: compiled by torch.compile, or with the fused kernels of Liger (Hsu et al., 2024)."""

import torch
from torch import nn

from clpet.errors import ModelError
from clpet.models.memory_saving import transformer_blocks
from clpet.models.protocols import config_of

GRAPHS = 64  # of a block's code: one per adapter, in training and in evaluation


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the transformer blocks of a network when they first run. Raises ModelError if no block is marked.

    Blocks of the same shape share a graph, after at most three lengths and sizes one of any length and size. Every
    adapter has a graph of its own, so that switching back to one compiles nothing.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for block in transformer_blocks(model):
        block.compile(backend=backend)


def use_liger(model: nn.Module) -> None:
    """Replaces norms, rotary positions and gated layers by Liger's kernels; the losses stay those of clpet.

    Raises ModelError for a type of model without such kernels.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = config_of(model).model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"hardware.kernels=liger has no kernels for models of type {kind}: set it to none")
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=model, **losses)
