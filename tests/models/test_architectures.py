"""The table of architectures: facts of its rows, and models without a row."""

from types import SimpleNamespace

import pytest
from torch import nn

from clpet.models.architectures import (
    MODEL_TYPES,
    attention_outputs,
    block_outputs,
    dropout_rates,
    first_position,
    is_decoder_type,
    logit_cap,
)


@pytest.mark.parametrize(("model_type", "position"), [("roberta", 2), ("mpnet", 2), ("bert", 0), ("unheard_of", 0)])
def test_first_position_follows_the_padding_id_in_roberta_like_models(model_type: str, position: int) -> None:
    assert first_position(SimpleNamespace(model_type=model_type, pad_token_id=1)) == position


def test_decoders_are_recognised_by_model_type() -> None:
    decoders = {name for name in MODEL_TYPES if is_decoder_type(name)}
    assert decoders == {"llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "mistral", "opt"}
    assert not is_decoder_type("unheard_of")
    assert not is_decoder_type(None)


def test_layers_are_recognised_by_name() -> None:
    """A model of an unknown type that has LLaMA's layers is treated like LLaMA."""
    block = nn.ModuleDict(
        {"self_attn": nn.ModuleDict({"o_proj": nn.Linear(2, 2)}), "mlp": nn.ModuleDict({"down_proj": nn.Linear(2, 2)})}
    )
    assert attention_outputs(nn.ModuleList([block])) == ["self_attn.o_proj"]
    assert block_outputs(block) == ("self_attn.o_proj", "mlp.down_proj")
    assert attention_outputs(nn.Linear(2, 2)) == []
    assert block_outputs(nn.Linear(2, 2)) is None


def test_dropout_rates_and_logit_caps_are_read_from_the_config() -> None:
    config = SimpleNamespace(attn_pdrop=0.1, classifier_dropout=0.5, final_logit_softcapping=30.0)
    assert dropout_rates(config) == {"attn_pdrop": 0.1}
    assert logit_cap(config) == "final_logit_softcapping"
    assert logit_cap(SimpleNamespace()) is None
