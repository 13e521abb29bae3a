"""What clpet knows of each transformer architecture: one row per model type, the only table of its kind.

A model type that has no row still trains with most options; what needs a fact that is missing here (`peft=blocks`, the
attention's output projection) refuses it with a message.
"""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from clpet.models.protocols import NetworkConfig, network_of

# The names under which configs of transformers hold the dropout rates of a network, classifiers excluded.
DROPOUT_KEYS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout", "hidden_dropout_prob",
                "attention_probs_dropout_prob", "dropout_rate", "dropout")  # fmt: skip
LOGIT_CAP_KEYS = ("head_logits_cap", "final_logit_softcapping")


@dataclass(frozen=True)
class ModelType:
    """One row: the facts about a `model_type` of transformers that its config does not state.

    `attention_outputs` are the names of the projections behind the attention, matched at the end of a module's name.
    `block_outputs` are the two layers through which a block adds to its residual stream: with both at zero the block
    is the identity. `first_position_after_padding`: positions are counted from the padding id on, as in RoBERTa.
    """

    is_decoder: bool = False
    attention_outputs: tuple[str, ...] = ()
    block_outputs: tuple[str, str] | None = None
    first_position_after_padding: bool = False


_BERT = ModelType(attention_outputs=("attention.output.dense",))
_ROBERTA = ModelType(attention_outputs=("attention.output.dense",), first_position_after_padding=True)
_AFTER_PADDING = ModelType(first_position_after_padding=True)
_LLAMA = ModelType(True, ("self_attn.o_proj",), ("self_attn.o_proj", "mlp.down_proj"))
_T5 = ModelType(attention_outputs=("SelfAttention.o", "EncDecAttention.o"))

MODEL_TYPES = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "gpt2": ModelType(True, ("attn.c_proj",), ("attn.c_proj", "mlp.c_proj")),
    "gpt_neox": ModelType(True, (), ("attention.dense", "mlp.dense_4h_to_h")),
    "ibert": _AFTER_PADDING,
    "layoutlmv3": _AFTER_PADDING,
    "lilt": _AFTER_PADDING,
    "llama": _LLAMA,
    "longformer": _AFTER_PADDING,
    "luke": _AFTER_PADDING,
    "markuplm": _AFTER_PADDING,
    "mistral": _LLAMA,
    "mpnet": ModelType(attention_outputs=("attn.o",), first_position_after_padding=True),
    "opt": ModelType(True, ("self_attn.out_proj",)),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _AFTER_PADDING,
    "t5": _T5,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _AFTER_PADDING,
    "xmod": _AFTER_PADDING,
}


def is_decoder_type(model_type: object) -> bool:
    """Whether models of this type read from left to right, where their config.json lists no architectures."""
    row = MODEL_TYPES.get(str(model_type))
    return bool(row and row.is_decoder)


def first_position(config: NetworkConfig) -> int:
    """Position id of a text's first token in the table of positions of `config`."""
    row = MODEL_TYPES.get(config.model_type)
    return config.pad_token_id + 1 if row and row.first_position_after_padding else 0


def dropout_rates(config: object) -> dict[str, float]:
    """The dropout rates of a network by their name in its config, classifiers excluded."""
    return {key: getattr(config, key) for key in DROPOUT_KEYS if getattr(config, key, None) is not None}


def attention_outputs(model: nn.Module) -> list[str]:
    """The output projections of the model's attention layers, to be used as targets; empty where none is known.

    Matched by module name and not by `model_type`, so that a model that shares another one's layers is recognised too.
    """
    modules = [name for name, _ in model.named_modules()]
    candidates = dict.fromkeys(target for row in MODEL_TYPES.values() for target in row.attention_outputs)
    return [target for target in candidates if any(matches(name, target) for name in modules)]


def all_linear(model: nn.Module, pooled: bool) -> list[str]:
    """The names of a network's linear layers without the output layer; with the pooler only if it is used."""
    inside, output = _inside(model), _output_layer(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module in inside
        and module is not output
        and (pooled or "pooler" not in name.split("."))
    ]


def norm_layers(model: nn.Module) -> list[str]:
    """The names of a network's norm layers: LayerNorm, RMSNorm and those that transformers names so."""
    inside = _inside(model)
    named = [(name, module) for name, module in model.named_modules() if module in inside]
    return [name for name, module in named if type(module).__name__.endswith("Norm") and hasattr(module, "weight")]


def _inside(model: nn.Module) -> set[nn.Module]:
    """The modules of the network below its head for tokens, which `base_model` of transformers leaves out."""
    return set(getattr(model, "base_model", model).modules())


def _output_layer(model: nn.Module) -> nn.Module | None:
    return network_of(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def block_outputs(block: nn.Module) -> tuple[str, str] | None:
    """The two layers through which a block adds to its input; None for a block of an unknown kind."""
    candidates = dict.fromkeys(row.block_outputs for row in MODEL_TYPES.values() if row.block_outputs)
    return next((names for names in candidates if all(_has_submodule(block, name) for name in names)), None)


def matches(module_name: str, target: str) -> bool:
    """Whether a module's name equals the target or ends with it."""
    return module_name == target or module_name.endswith(f".{target}")


def logit_cap(config: object) -> str | None:
    """The option of a model that caps its logits after the output layer, as Gemma 2 does; None for other models."""
    return next((key for key in LOGIT_CAP_KEYS if getattr(config, key, None)), None)


def _has_submodule(block: nn.Module, name: str) -> bool:
    try:
        return bool(block.get_submodule(name))
    except AttributeError:
        return False
