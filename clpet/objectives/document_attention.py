"""Attention within documents: texts that stand in one row without reading each other."""

import inspect

import torch
from torch import Tensor, nn

from clpet.errors import ModelError
from clpet.models.protocols import config_of, network_of


def document_mask(documents: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """[batch, 1, query, key], added to attention scores: 0 inside a document, the smallest number elsewhere.

    `documents` [batch, length] number the documents of each row.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    if causal:
        length = documents.shape[1]
        same = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill(~same, torch.finfo(dtype).min)


def document_positions(documents: Tensor) -> Tensor:
    """[batch, length]: positions that start at 0 in every document, so that it is read as if it were alone."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    start = torch.zeros_like(documents).scatter_reduce(1, documents, index, "amin", include_self=False)  # by document
    return index - start.gather(1, documents)


def is_flash(model: nn.Module) -> bool:
    """Whether a network's attention separates documents by their positions, in one row, instead of a mask."""
    return "flash" in str(config_of(model)._attn_implementation)


def check_window(model: nn.Module, name: str, option: str, longest: int) -> None:
    """Raises ModelError where layers read a window of fewer than `longest` tokens.

    transformers takes a mask [batch, 1, query, key] for all layers as it is, so such layers would read whole documents.
    """
    config = config_of(model)
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or any(kind.startswith(("sliding", "chunked")) for kind in kinds)
    sizes = [getattr(config, size, None) for size in ("sliding_window", "attention_chunk_size", "local_attention")]
    shortest = min((size for size in sizes if isinstance(size, int)), default=longest)
    if windowed and shortest < longest and not is_flash(model):
        raise ModelError(
            f"{option}=true, but layers of model {name} attend to windows of {shortest} tokens, which texts of up to "
            f"{longest} tokens exceed: set it to false, or lower benchmark.max_length"
        )


@torch.no_grad()
def check_separation(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Raises ModelError for a decoder that does not keep documents of a row apart exactly.

    The second of two documents must have the same hidden states, bit for bit, whatever the tokens of the first are, and
    up to rounding those that it has alone.
    """
    problem = f"hardware.padding_free=true, but model {name} does not keep texts in a row apart: set it to false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(problem)
    device = next(model.parameters()).device
    first, second = torch.tensor([[5, 6, 7], [7, 5, 5]], device=device), torch.tensor([6, 7, 5, 7], device=device)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=device)
    states = [hidden(model, torch.cat([row, second])[None], documents, dtype)[0, 3:].float() for row in first]
    expected = hidden(model, second[None], documents[:, 3:] * 0, dtype)[0].float()
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    if not torch.equal(*states) or not torch.allclose(states[0], expected, rtol=tolerance, atol=tolerance):
        raise ModelError(problem)


def hidden(model: nn.Module, ids: Tensor, documents: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, length, vocabulary]: the output for rows of documents."""
    return network_of(model)(input_ids=ids, use_cache=False, **attention_inputs(model, documents, dtype)).logits


def attention_inputs(model: nn.Module, documents: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a decoder that separate the documents of its rows."""
    positions = {"position_ids": document_positions(documents)}
    return positions if is_flash(model) else {"attention_mask": document_mask(documents, dtype, True), **positions}
