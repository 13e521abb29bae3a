"""A decoder's pass over packed rows (hardware.padding_free)."""

import numpy as np
import torch
from torch import Tensor, nn

from clpet.data.batches import EncodedDataset
from clpet.data.packed_rows import divide, pack_rows
from clpet.models.flops import Pass
from clpet.models.protocols import network_of
from clpet.objectives.document_attention import attention_inputs, is_flash
from clpet.objectives.output_layer import selecting


def packed_logits(model: nn.Module, pool: EncodedDataset, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[terms, vocabulary] fp32: logits of the tokens to predict in rows of a pool, example after example."""
    network = network_of(model)
    packed = pack_rows(pool, rows, next(model.parameters()).device, one_row=is_flash(model))
    inputs = attention_inputs(model, packed.documents, dtype)
    with selecting(network, lambda hidden: hidden.flatten(0, 1)[packed.before]):
        return network(input_ids=packed.input_ids, use_cache=False, **inputs).logits.float()


def packed_work(model: nn.Module, pool: EncodedDataset, rows: np.ndarray) -> Pass:
    """The shape of this pass."""
    _, members, width = divide(pool, rows, is_flash(model))
    return Pass(len(members), width, 0, int(pool.weights[rows].sum()))
