"""Numbers that the authors' own code (Pbihao/SLM at bef385c) printed for given inputs, in fp64 on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from clpet.methods.components.key_retrieval import KeyLearning, cosines, over_groups, retrieve
from clpet.models.adapters import Adapters
from clpet.models.backbone import Backbone
from clpet.models.peft_options import Frozen, Lora
from clpet.models.stacked_lora import StackedLora, require_attention_outputs
from tests.conftest import double
from tests.models.test_sentence_encoder import make_encoder

# [item, group, chunk] and [group, key, chunk]: two groups of two numbers each.
QUERIES = double([[1, 0.2, 0.1, 1], [1, 1, -1, 1], [0, 2, 1, 1]]).unflatten(1, (2, 2))
KEYS = double([[[1, 0], [0, 1]]] * 2)


@pytest.mark.parametrize(
    ("top_k", "draws", "loss", "gradient"),
    [
        (1, None, -0.8494897016, [0, -0.1505372, 0, 0, 0, -0.1178511, 0.1012672, 0]),
        (2, None, -0.5083054037, [0, -0.1586019, -0.1406406, 0, 0, -0.2007709, -0.0082920, 0]),
        (1, [[0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.9, 0.1], [0.9, 0.9, 0.1, 0.9]], -0.6137874412,
         [0, -0.0326860, -0.1178511, 0, 0, -0.1178511, -0.1344351, 0]),
    ],
)  # fmt: skip
def test_key_loss(top_k: int, draws: list | None, loss: float, gradient: list) -> None:
    """Retriever.forward of vectordb/models/retriever.py: loss and gradient, with draws [item][group][key] and p = 0.2."""
    keys = nn.Parameter(KEYS.clone())
    dropped = torch.ones(3, 2, 2) if draws is None else torch.tensor(draws).unflatten(1, (2, 2))
    key_loss = KeyLearning(top_k=top_k, dropout=0.2).loss(QUERIES, keys, dropped)
    key_loss.backward()
    assert key_loss.item() == pytest.approx(loss, abs=1e-9)
    assert keys.grad is not None
    assert torch.allclose(keys.grad.flatten(), double(gradient), atol=1e-7)


def test_learned_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same forward in the loop of vectordb/train.py: three epochs over the items, one by one in order."""
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    stage = KeyLearning(top_k=1, dropout=0.0, epochs=3, min_steps=0, lr=0.05, batch_size=1, clip=0.1)
    keys = stage.learn(QUERIES, KEYS, 0, lambda *_: None, dry_run=False)
    expected = double([[[0.8213845, 0.2559350], [0, 0.9968542]], [[0.9968542, 0], [0.0883761, 1.0322503]]])
    assert torch.allclose(keys, expected, atol=1e-7)


def increment(stack: StackedLora, weights: torch.Tensor) -> torch.Tensor:
    """[2, 2]: the weighted sum of the values of the only layer; rows are outputs."""
    (layer,) = stack.layers.values()
    with torch.no_grad(), stack.selected_branches(weights):
        return layer.forward(layer.module, (torch.eye(2).double()[None],), torch.zeros(1, 2, 2).double())[0].T


def test_retrieval_and_increment() -> None:
    """Retriever.forward of SLM-bert/models/retriever.py: K = 2 of three keys, alone and for a batch of two."""
    model = BertModel(BertConfig(vocab_size=10, hidden_size=2, num_hidden_layers=1, num_attention_heads=1,
                                 intermediate_size=2, max_position_embeddings=8))  # fmt: skip
    backbone = Backbone(name="any", path=".")
    lora = Lora(r=1, alpha=1, targets=require_attention_outputs(model))
    stack = StackedLora(Adapters(model, backbone, Frozen()), lora.peft_config(backbone, model))
    stack.add(0, 3)
    (layer,) = stack.layers.values()
    a, b = double([[1, 0], [0, 2], [1, 1]]), double([[1, 1], [1, -1], [0, 3]])
    layer.set(layer.frozen_A.double(), layer.frozen_B.double(), b, a.T)
    sigma = cosines(QUERIES, double([[[1, 0], [1, 1], [0, 1]]] * 2))
    assert torch.allclose(over_groups(sigma)[0], double([[0.5400422, 0.8030038, 0.5955767]]), atol=1e-7)
    expected = {(0,): [[0, 1.2775311], [1.1483126, 0.1292184]], (1,): [[0, 1.7573593], [0.8284271, 0.9289322]],
                (0, 2): [[0, 1.3998158], [1.0667894, 0.3330264]]}  # fmt: skip
    for rows, delta in expected.items():
        weights = retrieve(sigma[list(rows)], 2, batch_mean=len(rows) > 1).branches(3)
        for one in weights:
            assert torch.allclose(increment(stack, one[None]), double(delta), atol=1e-6)


def test_initial_values_and_keys(make, tmp_path: Path) -> None:
    """Retriever.__init__: a = 0, b of standard deviation 1, keys orthonormal in every group."""
    encoder = make_encoder(tmp_path / "encoder", size=48)
    sizes = ["method.groups=6", "method.keys=4", "method.top_k=4"]
    run = make("method=slm", f"method.encoder={encoder}", *sizes, "method.stage1.lr=0", "method.stage1.weight_decay=0",
               "method.stage1.min_steps=0", "train.lr=0", "train.epochs=1")  # fmt: skip
    run.learn(0)
    assert torch.allclose(run.method.key_pool[0] @ run.method.key_pool[0].mT, torch.eye(4).expand(6, 4, 4), atol=1e-5)
    layers = run.method.stack.state().values()
    assert all(not layer["B"].any() for layer in layers)  # a, as B A is what the paper calls a b
    drawn = torch.cat([layer["A"].flatten() for layer in layers])
    assert drawn.std().item() == pytest.approx(1, abs=4 / (2 * len(drawn)) ** 0.5)
