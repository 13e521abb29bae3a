"""Floating-point operations of a pass through the network, by formula from its matrices and its attention.

A matrix of n scalars takes 2 n operations per position forwards. Backwards it takes 2 n where the gradient passes
through it to earlier trained tensors, and 2 n if it is trained itself (Kaplan et al., 2020, arXiv 2001.08361, section
2.1, with frozen tensors left out). Attention takes 4 k q d per layer forwards, for q queries and k keys of width d (all
heads together; causal attention is not counted as half), and twice as many backwards. Embedding tables, norms,
activation functions, softmax and the optimiser are left out; the first block with trained tensors counts as a whole.
With recomputed activations the backward pass contains a second forward pass.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clpet.models.protocols import NetworkConfig, config_of, network_of


@dataclass(frozen=True)
class Pass:
    """The shape of a pass of a batch: `examples` rows of `source` positions, padding included.

    `target` are the positions of the decoder of an encoder-decoder; the output layer is applied to `outputs` positions
    of the whole batch.
    """

    examples: int
    source: int
    target: int = 0
    outputs: int = 0


@dataclass
class Stack:
    """An encoder or a decoder: scalars of its matrices, of those that a gradient passes through, and of trained ones.

    `layers` attend; a gradient passes through `reached` of them.
    """

    matrices: int = 0
    through: int = 0
    trained: int = 0
    layers: int = 0
    reached: int = 0

    def add(self, matrices: int, through: int, trained: int) -> None:
        """Adds a layer."""
        self.matrices += matrices
        self.through += through
        self.trained += trained

    def forward(self, positions: int) -> int:
        """Operations of the matrices for a number of positions."""
        return 2 * self.matrices * positions

    def backward(self, positions: int) -> int:
        """The same for the backward pass."""
        return 2 * (self.through + self.trained) * positions


class Branches(Protocol):
    """Low-rank branches, which are added to the layers of the network."""

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Forward passes inside ignore them."""

    def matrices(self) -> tuple[str, int, int]:
        """The name of the first layer that has them, scalars of all branches, and of the trained ones."""

    def spectra(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The singular values of what they add to every layer, and the layer's weight; nothing if they are off."""


@dataclass
class NetworkFlops:
    """The operations of a network in its present state: with the active adapter, and with what is trained now.

    `prompt` vectors stand in front of every text. A classification head and a pooler, which read one vector of a text,
    are left out.
    """

    source: Stack = field(default_factory=Stack)
    target: Stack = field(default_factory=Stack)
    output: Stack = field(default_factory=Stack)
    width: int = 0  # of the attention, all heads together
    prompt: int = 0
    recomputes: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inactive: frozenset[str] = frozenset(),
        branches: Sequence[Branches] = (),
        prompt: int = 0,
        learned_input: bool = False,
        learned_keys: bool = False,
    ) -> "NetworkFlops":
        """Counts the matrices of a network; those of the adapters `inactive` do not take part.

        With `learned_input`, such as a learned prompt, the gradient passes through the whole network; with
        `learned_keys` in front of those of every layer, through all layers of the part that writes.
        """
        config = config_of(model)
        seq2seq = bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "lm_head")
        flops = cls(width=_attention_width(config), prompt=prompt, recomputes=_recomputes(model))
        output = network_of(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        extra: dict[str, tuple[int, int]] = {}
        for name, count, trained in (branch.matrices() for branch in branches):
            others = extra.get(name, (0, 0))
            extra[name] = others[0] + count, others[1] + trained
        first = "" if learned_input else None  # name of the first module that is trained; None before it
        for name, module in model.named_modules():
            words = name.split(".")
            if "pooler" in words or not inactive.isdisjoint(words):
                continue
            stack = flops.output if module is output else flops.target if _is_target(name, seq2seq) else flops.source
            if first is None and learned_keys and seq2seq == (stack is flops.target):
                first = name
            size, is_trained = _matrix(module)
            stack.add(size, 0 if first is None else size, size if is_trained else 0)
            if name in extra:
                stack.add(extra[name][0], *extra[name])
            if first is None and (
                name in extra or any(parameter.requires_grad for parameter in module.parameters(False))
            ):
                first = name
        flops._count_layers(config, seq2seq, first)
        return flops

    def _count_layers(self, config: NetworkConfig, seq2seq: bool, first: str | None) -> None:
        """Sets the layers of both stacks, and how many of them a gradient passes through from the first trained on."""
        self.source.layers = config.num_hidden_layers
        self.target.layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers if seq2seq else 0
        if first is None:
            return
        in_target = _is_target(first, seq2seq)
        self.source.reached = 0 if in_target else max(0, self.source.layers - _layer(first))
        self.target.reached = max(0, self.target.layers - (_layer(first) if in_target else 0))

    def forward(self, work: Pass) -> int:
        """Operations of a forward pass."""
        source = work.source + self.prompt
        operations = self.source.forward(work.examples * source) + self.target.forward(work.examples * work.target)
        return operations + self.output.forward(work.outputs) + self._attention(work, False)

    def backward(self, work: Pass) -> int:
        """Operations of the backward pass that follows it."""
        positions, answers = work.examples * (work.source + self.prompt), work.examples * work.target
        operations = self.source.backward(positions) + self.target.backward(answers)
        operations += self.output.backward(work.outputs) + 2 * self._attention(work, True)
        if self.recomputes and self.source.reached + self.target.reached:
            operations += self.forward(work) - self.output.forward(work.outputs)
        return operations

    def _attention(self, work: Pass, reached_only: bool) -> int:
        """4 k q d for every layer: the products of queries with keys and of weights with values."""
        source, target = work.source + self.prompt, work.target
        encoder, decoder = ((s.reached if reached_only else s.layers) for s in (self.source, self.target))
        pairs = encoder * source**2 + decoder * target * (target + source)
        return 4 * self.width * work.examples * pairs


def _matrix(module: nn.Module) -> tuple[int, bool]:
    """The scalars of a linear layer, (0, False) for other modules, and whether it is trained."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):  # its size and not that of the weight, which 4-bit layers pack
        return module.in_features * module.out_features, isinstance(weight, Tensor) and weight.requires_grad
    if isinstance(module, Conv1D) and isinstance(weight, Tensor):
        return weight.numel(), weight.requires_grad
    return 0, False


def _is_target(name: str, seq2seq: bool) -> bool:
    """Whether a module reads the positions of the decoder; its keys and values of the encoder's output do not."""
    words = name.split(".")
    cross = {"EncDecAttention", "encoder_attn"}.intersection(words)
    return seq2seq and "decoder" in words and not (cross and {"k", "v", "k_proj", "v_proj"}.intersection(words))


def _layer(name: str) -> int:
    """The number of the block that a module is in; 0 for what lies before all blocks."""
    number = re.search(r"\.(\d+)\.", f"{name}.")
    return int(number[1]) if number else 0


def _attention_width(config: NetworkConfig) -> int:
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 0)
    each = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return heads * each if heads and each else config.hidden_size


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
