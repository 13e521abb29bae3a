"""LoRA on a bf16 backbone: products in bf16, factors and gradients in fp32, half of the memory for the backward pass."""

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from clpet.models.adapter_precision import compute_in_input_dtype

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def lora(kind: str, dtype: torch.dtype) -> nn.Module:
    """A small network with a LoRA adapter whose B is not zero."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model: nn.Module = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
        targets = ["c_attn"]
    else:
        sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model, targets = BertModel(BertConfig(intermediate_size=32, **sizes)), ["query", "dense"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model.to(dtype), config).eval()


def read(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The last hidden state, and the gradients of the adapter for the sum of its squares."""
    output = model(input_ids=IDS).last_hidden_state
    output.float().square().sum().backward()
    return output, [value.grad for value in model.parameters() if value.grad is not None]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_autocast(kind: str, dtype: torch.dtype) -> None:
    """An independent path of torch and peft gives the same outputs and gradients bit for bit."""
    model, twin = lora(kind, dtype), lora(kind, dtype)
    compute_in_input_dtype(model, "default")
    output, gradients = read(model)
    enabled = dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled), disable_input_dtype_casting(twin, enabled):
        expected, expected_gradients = read(twin)
    assert output.dtype is dtype
    assert torch.equal(output, expected)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(map(torch.equal, gradients, expected_gradients))
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_other_variants_keep_their_products() -> None:
    """DoRA's norms are computed in fp32, so its layers keep peft's casts."""
    model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    config = peft.LoraConfig(r=2, target_modules=["query"], use_dora=True)
    model = peft.get_peft_model(model.bfloat16(), config)
    before = {name: type(module) for name, module in model.named_modules()}
    compute_in_input_dtype(model, "default")
    assert {name: type(module) for name, module in model.named_modules()} == before
