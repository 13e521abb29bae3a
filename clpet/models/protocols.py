"""What clpet calls of the tokenizers, configs and auto classes of transformers, as types.

transformers builds many of these members at run time, so that its own classes do not show them to a type checker.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, cast, overload

import numpy as np
from torch import Tensor, nn

from clpet.records import Json


class TextEncoding(TypedDict):
    """The tokens of one text."""

    input_ids: list[int]
    offset_mapping: NotRequired[list[tuple[int, int]]]  # with return_offsets_mapping=True


class TextsEncoding(TypedDict):
    """The tokens of several texts."""

    input_ids: list[list[int]]
    offset_mapping: NotRequired[list[list[tuple[int, int]]]]


class PaddedBatch(Protocol):
    """Tensors by name, as `Tokenizer.pad` returns them; `dict` accepts it."""

    def keys(self) -> Sequence[str]: ...

    def __getitem__(self, key: str) -> Tensor: ...

    def to(self, device: object) -> "PaddedBatch": ...


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    cls_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    mask_token_id: int | None
    eos_token: str | None
    sep_token: str | None
    unk_token: str | None
    pad_token: str | None
    mask_token: str | None
    padding_side: str
    is_fast: bool
    all_special_tokens: list[str]
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, object]
    chat_template: str | None

    def __len__(self) -> int: ...

    @overload
    def __call__(self, text: str, **options: object) -> TextEncoding: ...

    @overload
    def __call__(self, text: list[str], **options: object) -> TextsEncoding: ...

    def decode(self, ids: Sequence[int] | Tensor | np.ndarray, **options: object) -> str: ...

    def batch_decode(self, rows: Sequence[Sequence[int]] | Tensor, **options: object) -> list[str]: ...

    def convert_tokens_to_ids(self, token: str) -> int | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def add_special_tokens(self, tokens: dict[str, list[str]], replace_extra_special_tokens: bool = True) -> int: ...

    def apply_chat_template(self, conversation: list[Mapping[str, Json]], **options: object) -> object: ...

    def get_chat_template(self) -> str: ...

    def pad(self, rows: dict[str, list[list[int]]], **options: object) -> PaddedBatch: ...

    def save_pretrained(self, folder: str | Path) -> object: ...


class NetworkConfig(Protocol):
    """The config of a network of transformers; dropout rates have a name per architecture, see `dropout_rates`."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    pad_token_id: int
    tie_word_embeddings: bool
    decoder_start_token_id: int  # of encoder-decoders
    is_encoder_decoder: bool
    _attn_implementation: str

    def to_dict(self) -> dict[str, object]: ...


class AutoClass(Protocol):
    """An auto class of transformers, such as AutoModelForCausalLM."""

    __name__: str

    def from_pretrained(self, source: str | Path, **options: object) -> tuple[nn.Module, dict[str, Sequence[str]]]: ...

    def from_config(self, config: object) -> nn.Module: ...


class NetworkClass(Protocol):
    """A class of networks of transformers, such as LlamaModel."""

    def from_pretrained(self, source: str | Path, **options: object) -> nn.Module: ...


class SavedNetwork(Protocol):
    """A network that can be written into a folder."""

    def save_pretrained(self, folder: str | Path) -> object: ...


class KeyValueCache(Protocol):
    """The keys and values of the tokens read so far."""

    def batch_repeat_interleave(self, repeats: int) -> object: ...


class NetworkOutput(Protocol):
    """The output of a forward pass; which attributes it has depends on the auto class."""

    logits: Tensor
    last_hidden_state: Tensor
    past_key_values: KeyValueCache
    hidden_states: tuple[Tensor, ...]  # of the embeddings and of every block, with output_hidden_states=True


class Network(Protocol):
    """A network of transformers, as clpet calls it."""

    config: NetworkConfig

    @property
    def base_model(self) -> "Network": ...

    def __call__(self, **inputs: object) -> NetworkOutput: ...

    def generate(self, **inputs: object) -> Tensor: ...

    def get_encoder(self) -> "Network": ...

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module: ...


def network_of(model: nn.Module) -> Network:
    """The model as a network of transformers; nn.Module declares its attributes as tensors and modules only."""
    return cast(Network, model)


def config_of(model: nn.Module) -> NetworkConfig:
    """The config of a network."""
    return network_of(model).config
