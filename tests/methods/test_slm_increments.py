"""SLM's values: what the low-rank increments compute on every target layer, and their gradients and sizes."""

import pytest
import torch
from torch import nn

from clpet.errors import ModelError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Backbone
from clpet.models.peft_options import Frozen, Lora
from clpet.models.stacked_lora import StackedLora, require_attention_outputs
from tests.models.test_stacked_lora import IDS, network, read

OUTPUTS = {"bert": 2, "llama": 2, "t5": 6, "gpt2": 2}


def increments(model: nn.Module, targets: list[str] | None, r: int = 3) -> StackedLora:
    backbone = Backbone(name="any", path=".")
    lora = Lora(r=r, alpha=r, targets=targets or require_attention_outputs(model))
    return StackedLora(Adapters(model, backbone, Frozen()), lora.peft_config(backbone, model))


def filled(stack: StackedLora, tasks: int, count: int, dtype: torch.dtype = torch.float32) -> StackedLora:
    for task in range(tasks):
        stack.add(task, count, lambda b, generator: b.normal_(generator=generator))
        for layer in stack.layers.values():
            new = torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(task)) * 0.1
            layer.set(layer.frozen_A.to(dtype), layer.frozen_B.to(dtype), layer.A.detach().to(dtype), new.to(dtype))
    return stack


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_default_targets_are_the_output_projections_of_attention(kind: str) -> None:
    """One layer per attention; in T5 those of encoder, decoder and cross-attention."""
    stack = increments(network(kind), None)
    assert len(stack.layers) == OUTPUTS[kind]
    bare = read(stack, IDS)
    stack.add(0, 4)
    assert torch.equal(read(stack, IDS), bare)


def test_a_target_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(ModelError, match=r"names the layer o_proj, .* available: dense, key, query, value"):
        increments(network("bert"), ["query", "o_proj"])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", None),
        ("bert", ["intermediate.dense"]),
        ("llama", ["k_proj", "o_proj", "down_proj"]),
        ("t5", ["o", "wi"]),
    ],
)
def test_factored_and_dense_increments_agree(
    kind: str, targets: list[str] | None, dtype: torch.dtype, most: float
) -> None:
    """Both equal W + sum_i w_i A_i B_i computed for each text alone, also for layers that are not square."""
    stack = filled(increments(network(kind).to(dtype), targets), 2, 4, dtype)
    weights = torch.rand(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    branches = torch.tensor([1, 4, 7])
    with torch.no_grad(), stack.selected_branches(weights, branches):
        together = read(stack, IDS)
    for row in range(3):
        for layer in stack.layers.values():
            a, b = layer.all()
            delta = sum(
                w * b.view(-1, 8, 3)[:, i] @ a.view(8, 3, -1)[i] for w, i in zip(weights[row], branches, strict=True)
            )
            layer.frozen_weight = layer.module.weight.detach().clone()
            assert dtype is torch.float32 or torch.linalg.matrix_rank(delta) <= 9
            layer.module.weight.data += delta
        with torch.no_grad(), stack.off():
            dense = read(stack, IDS[row : row + 1])
        for layer in stack.layers.values():
            layer.module.weight.data = layer.frozen_weight
        with torch.no_grad(), stack.selected_branches(weights[row : row + 1], branches):
            alone = read(stack, IDS[row : row + 1])
        assert (together[row] - dense[0]).abs().max() <= most
        assert (together[row] - alone[0]).abs().max() <= most
    with torch.no_grad(), stack.off():
        assert (read(stack, IDS) - together).abs().max() > 0.01


def test_the_newest_values_alone_get_gradients() -> None:
    """Without a list of branches the newest are used, which equals weights of 0 for all others."""
    stack = filled(increments(network("llama"), None), 2, 2)
    weights = torch.rand(3, 2)
    with stack.selected_branches(weights):
        new = read(stack, IDS)
    with stack.branch_weights(torch.cat([torch.zeros(3, 2), weights], 1)):
        assert torch.allclose(read(stack, IDS), new, atol=1e-6)
    new.square().sum().backward()
    assert all(tensor.grad is not None for tensor in stack.current().values())
    assert all(parameter.grad is None for parameter in stack.adapters.model.parameters())
    with torch.no_grad():
        base, layer = read(stack, IDS), next(iter(stack.layers.values()))
        layer.B.mul_(2)  # twice a is twice the increment of a layer
    with stack.selected_branches(weights), torch.no_grad():
        x = torch.randn(3, 4, 16)
        doubled = layer.forward(layer.module, (x,), torch.zeros(3, 4, 16))
        layer.B.div_(2)
        assert torch.allclose(doubled, 2 * layer.forward(layer.module, (x,), torch.zeros(3, 4, 16)), atol=1e-5)
    assert base.shape == new.shape


@pytest.mark.parametrize(
    ("shape", "rank", "value"),
    [(("bert", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}), 12, 221_184),
     (("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}), 8, 2_097_152)],
)  # fmt: skip
def test_sizes_of_values(shape: tuple, rank: int, value: int) -> None:
    """Number of scalars of one value; four values of BERT have 884,736, 24 of LLaMA 50,331,648."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(shape[0], **shape[1]))
        stack = increments(model, None, rank)
        stack.add(0, 4)
    assert stack.count() == 4 * value
    assert 24 * 2_097_152 == 50_331_648
