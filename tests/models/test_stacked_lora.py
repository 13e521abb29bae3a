"""Stacked LoRA branches: a layer's output, its gradients, and saved state."""

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import AutoConfig, AutoModel

from clpet.errors import ModelError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Backbone
from clpet.models.peft_options import Lora
from clpet.models.stacked_lora import StackedLora

SHAPES = {
    "bert": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}, ["query", "value"]),
    "llama": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}, ["q_proj", "v_proj"]),
    "t5": ({"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 32}, ["q", "v"]),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, ["c_attn"]),
}  # fmt: skip


def network(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    values, _ = SHAPES[kind]
    config = AutoConfig.for_model(kind, vocab_size=50, **values)
    return AutoModel.from_config(config, attn_implementation="eager").eval()


def make_stack(kind: str, model: nn.Module | None = None, **options) -> StackedLora:
    backbone = Backbone(name=kind, path=".", targets=SHAPES[kind][1])
    return StackedLora(Adapters(model or network(kind), backbone, Lora(r=3, alpha=6, **options)))


def read(stack: StackedLora, ids: torch.Tensor) -> torch.Tensor:
    model = stack.adapters.model
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).last_hidden_state


def randomised(stack: StackedLora, branches: int) -> StackedLora:
    for branch in range(branches):
        stack.add(branch)
        for tensor in stack.current().values():
            nn.init.normal_(tensor, std=0.3)
    return stack


def as_peft(stack: StackedLora, model: nn.Module) -> nn.Module:
    """LoRA of peft on `model` with the values of the newest branch."""
    twin = peft.get_peft_model(model, stack.config).eval()
    with torch.no_grad():
        for name, layer in stack.layers.items():
            module = twin.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B)
    return twin


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 20, 30, 40]])


@pytest.mark.parametrize("kind", SHAPES)
def test_one_branch_is_peft_lora_bit_for_bit(kind: str) -> None:
    """BERT, LLaMA, T5 with its decoder and GPT-2's transposed layers; a new branch does not change the output."""
    stack = make_stack(kind)
    base = read(stack, IDS)
    stack.add(7)
    assert torch.equal(read(stack, IDS), base)
    for tensor in stack.current().values():
        nn.init.normal_(tensor, std=0.3)
    twin = as_peft(stack, network(kind))
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    assert torch.equal(read(stack, IDS), twin(input_ids=IDS, **more).last_hidden_state)
    assert not torch.equal(read(stack, IDS), base)
    with stack.off():
        assert torch.equal(read(stack, IDS), base)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_bf16_backbone_keeps_fp32_branches(kind: str) -> None:
    """As peft does under autocast: the increment is computed in bf16, its gradients arrive in fp32."""
    stack = randomised(make_stack(kind, network(kind).bfloat16()), 1)
    twin = as_peft(stack, network(kind).bfloat16())
    output = read(stack, IDS)
    assert output.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(twin):
        assert torch.equal(output, twin(input_ids=IDS).last_hidden_state)
    output.float().square().sum().backward()
    assert all(tensor.dtype is torch.float32 and tensor.grad is not None for tensor in stack.current().values())


def test_branches_add_up_to_merged_weights() -> None:
    """Layers with the weights W + s sum_i B_i A_i give the same output."""
    stack = randomised(make_stack("bert"), 3)
    output = read(stack, IDS)
    with torch.no_grad(), stack.off():
        for layer in stack.layers.values():
            a, b = layer.all()
            layer.module.weight += stack.scale * b @ a
        assert torch.allclose(read(stack, IDS), output, atol=1e-5)


def test_branch_weights_apply_to_their_own_example() -> None:
    """A row gives the same output alone, in the batch, and with its weights applied to all rows."""
    stack = randomised(make_stack("bert"), 3)
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.2, -1.0, 0.3], [0.0, 0.0, 0.0]])
    with stack.branch_weights(weights), torch.no_grad():
        batched = read(stack, IDS)
    for row in range(3):
        with stack.branch_weights(weights[row : row + 1]), torch.no_grad():
            assert torch.allclose(read(stack, IDS[row : row + 1])[0], batched[row], atol=1e-6)
        with stack.branch_weights(weights[row]), torch.no_grad():
            assert torch.allclose(read(stack, IDS)[row], batched[row], atol=1e-6)
    with stack.off(), torch.no_grad():
        assert torch.equal(read(stack, IDS)[2], batched[2])
    assert stack.weights is None


def test_frozen_branches_get_no_gradient_and_stay_bit_identical() -> None:
    """Gradients reach only the newest A and B and the branch weights; a step changes nothing else."""
    stack = randomised(make_stack("t5"), 2)
    stack.add(9)
    before = {name: (layer.frozen_A.clone(), layer.frozen_B.clone()) for name, layer in stack.layers.items()}
    weights = torch.full((3, 3), 0.5, requires_grad=True)
    with stack.branch_weights(weights):
        read(stack, IDS).square().sum().backward()
    assert weights.grad is not None
    assert (weights.grad[:, :2] != 0).all()
    optimizer = torch.optim.AdamW(stack.current().values(), lr=0.1)
    optimizer.step()
    for name, layer in stack.layers.items():
        assert not layer.frozen_A.requires_grad
        assert layer.A.grad is not None
        assert torch.equal(layer.frozen_A, before[name][0])
        assert torch.equal(layer.frozen_B, before[name][1])
    assert all(parameter.grad is None for parameter in stack.adapters.model.parameters())


def test_adding_a_branch_keeps_the_earlier_ones() -> None:
    """After `add` the output is the same, and frozen_A and frozen_B hold the earlier branches bit for bit."""
    stack = randomised(make_stack("llama"), 2)
    before, output = stack.state(), read(stack, IDS)
    stack.add(5)
    assert torch.allclose(read(stack, IDS), output, atol=1e-6)
    for name, layer in stack.layers.items():
        assert torch.equal(layer.frozen_A, before[name]["A"])
        assert torch.equal(layer.frozen_B, before[name]["B"])


def test_dropout_has_one_mask_for_all_branches() -> None:
    """Two branches with equal factors and the weights 1 and -1 cancel only under the same mask."""
    stack = randomised(make_stack("bert", dropout=0.5), 1)
    factors = [tensor.detach().clone() for tensor in stack.current().values()]
    stack.add(1)
    with torch.no_grad():
        for tensor, factor in zip(stack.current().values(), factors, strict=True):
            tensor.copy_(factor)
    stack.adapters.train_mode(True)
    with stack.branch_weights(torch.tensor([1.0, -1.0])):
        output = read(stack, IDS)
    stack.adapters.train_mode(False)
    with stack.off():
        assert torch.allclose(output, read(stack, IDS), atol=1e-6)


def test_saved_branches_load_into_peft(tmp_path) -> None:
    """Each folder is a separate LoRA adapter; all of them together are the sum of the branches."""
    stack = randomised(make_stack("bert"), 2)
    stack.save(tmp_path, ["one", "two"])
    model = peft.PeftModel.from_pretrained(network("bert"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    for names, weights in ((["one"], [1.0, 0.0]), (["two"], [0.0, 1.0]), (["one", "two"], [1.0, 1.0])):
        model.base_model.set_adapter(names)
        with stack.branch_weights(torch.tensor(weights)), torch.no_grad():
            assert torch.allclose(read(stack, IDS), model(input_ids=IDS).last_hidden_state, atol=1e-5)


def test_state_comes_back_bit_for_bit() -> None:
    stack = randomised(make_stack("bert"), 3)
    twin = make_stack("bert")
    twin.load(stack.state())
    assert twin.branches == 3
    assert torch.equal(read(twin, IDS), read(stack, IDS))
    twin.load(make_stack("bert").state())
    assert twin.branches == 0


@pytest.mark.parametrize(("r", "count"), [(8, 2_359_296), (4, 1_179_648)])
def test_trained_parameters_of_t5_large(r: int, count: int) -> None:
    """Oracle 18: query and value of 24 encoder layers, 24 decoder layers and 24 cross-attentions, 1024 wide."""
    with torch.device("meta"):
        config = AutoConfig.for_model("t5", d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
        backbone = Backbone(name="t5_large", path=".", targets=["q", "v"])
        stack = StackedLora(Adapters(AutoModel.from_config(config), backbone, Lora(r=r, alpha=32)))
        stack.add(0)
    current = stack.current()
    assert len(stack.layers) == 144
    assert sum(tensor.numel() for tensor in current.values()) == count
    assert sum(tensor.numel() for name, tensor in current.items() if name.endswith(".B")) == count // 2


def test_missing_targets_are_named() -> None:
    backbone = Backbone(name="bert", path=".", targets=["q_proj"])
    with pytest.raises(ModelError, match=r"peft\.targets names the layer q_proj"):
        StackedLora(Adapters(network("bert"), backbone, Lora()))
    backbone.targets = ["word_embeddings"]
    with pytest.raises(ModelError, match="Embedding is not a linear layer"):
        StackedLora(Adapters(network("bert"), backbone, Lora()))
