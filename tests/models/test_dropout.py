"""Dropout of the backbone and of the head's input: which networks use it, at which rates, and when it is off."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from clpet.errors import ConfigError, ModelError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone, byte_tokenizer
from clpet.models.memory_saving import enable_recomputation
from clpet.models.peft_options import Frozen, FullFineTuning, Lora
from tests.conftest import tiny_args

IDS = torch.tensor([[5, 9, 77, 130, 12, 40, 8, 200]])
SMALL = {"vocab_size": 266, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 64}  # fmt: skip
NETWORKS: dict[str, dict] = {
    "bert": {"architecture": Architecture.encoder, "targets": ["query"], "config": {"model_type": "bert", **SMALL}},
    "t5": {"architecture": Architecture.encoder_decoder, "targets": ["q"],
           "config": {"model_type": "t5", "vocab_size": 266, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}},
    "gpt2": {"architecture": Architecture.decoder, "targets": ["c_attn"],
             "config": {"model_type": "gpt2", "vocab_size": 266, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}},
    "opt": {"architecture": Architecture.decoder, "targets": ["q_proj"],
            "config": {"model_type": "opt", **SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3}},
}  # fmt: skip


def network(shape: str, adapter: FullFineTuning, dropout: object, recompute: bool = False) -> Adapters:
    """A small network with an adapter; with `recompute` the backward pass recomputes activations."""
    backbone = Backbone(name=shape, random_weights=True, dropout=dropout, **NETWORKS[shape])
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0)
    adapters = Adapters(model, backbone, adapter)
    if recompute:
        enable_recomputation(model, adapters.drops)
    if not isinstance(adapter, Frozen):
        adapters.add("default", 0)
    return adapters


def read(adapters: Adapters) -> torch.Tensor:
    """The last hidden states of a text."""
    output = adapters.model(input_ids=IDS, **({} if adapters.model.config.is_encoder_decoder else {"use_cache": False}))
    return output.last_hidden_state


def passes_agree(adapters: Adapters) -> bool:
    """Whether two passes agree."""
    with torch.no_grad():
        return torch.equal(read(adapters), read(adapters))


@pytest.mark.parametrize("shape", NETWORKS)
def test_when_the_backbone_uses_dropout(shape: str) -> None:
    """auto: only if its weights are trained; own or a rate: always. In training only, and not inside `using`."""
    expected = {(FullFineTuning, "auto"): True, (FullFineTuning, "off"): False, (FullFineTuning, 0.2): True, (Lora, "auto"): False,
                (Lora, "off"): False, (Lora, "own"): True, (Lora, 0.2): True, (Lora, 0): False, (Frozen, "own"): True}  # fmt: skip
    for (kind, dropout), drops in expected.items():
        adapters = network(shape, kind(), dropout)
        rate = 0.2 if dropout == 0.2 else 0.3 if shape == "opt" else 0.1
        assert set(adapters.dropout().values()) == ({rate} if drops else set())
        assert passes_agree(adapters)
        adapters.train_mode(True)
        assert passes_agree(adapters) is not drops, (kind, dropout)
        if adapters.names:
            with adapters.using("default"):
                assert passes_agree(adapters)
            assert passes_agree(adapters) is not drops
        adapters.train_mode(False)
        assert passes_agree(adapters)


@pytest.mark.parametrize("shape", NETWORKS)
def test_recomputation_draws_the_same_dropout_masks(shape: str) -> None:
    """For a frozen backbone with and without dropout."""
    for dropout in ("own", "off"):
        gradients = []
        for recompute in (False, True):
            adapters = network(shape, Lora(r=2), dropout, recompute)
            adapters.train_mode(True)
            torch.manual_seed(1)
            read(adapters).square().sum().backward()
            gradients.append([tensor.grad for tensor in adapters.tensors("default").values()])
        assert sum(float(grad.abs().sum()) for grad in gradients[0]) > 0
        for first, second in zip(*gradients, strict=True):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def test_values_of_dropout() -> None:
    """null is the old name of auto; a bare off in YAML is false."""
    assert [Backbone(name="x", path=".", dropout=value).dropout for value in (None, False, 0.1)] == ["auto", "off", 0.1]
    for wrong in (1, -0.1, "on", True, [0.1]):
        with pytest.raises(ConfigError, match=r"model.dropout must be auto, own, off or a rate in \[0, 1\)"):
            Backbone(name="x", path=".", dropout=wrong)
    llama = {"model_type": "llama", **SMALL}
    plain = Backbone(name="llama", random_weights=True, architecture=Architecture.decoder, config=llama, dropout="own")
    model, _ = plain.load(torch.float32, torch.device("cpu"), 0)
    assert Adapters(model, plain, Frozen()).dropout() == {}  # its config has a rate of 0


METHODS: dict[str, list[str]] = {
    "mocl": [],
    "lwf": [],
    "ewc": [],
    "gain_lora": [],
    "dynamic_conpet": ["method.top_k=2"],
    "crl": ["replay=dynamic", "method.sample=20"],
    "ea_emr": ["replay=dynamic"],
    "emr": ["train.select=best"],
}


@pytest.mark.parametrize("method", METHODS)
def test_lookups_are_free_of_dropout(method: str, make) -> None:
    """The backbone is in training mode only inside training steps, and only where gradients are computed."""
    run = make(f"method={method}", "model.dropout=0.2", "train.epochs=1", *METHODS[method])
    stepping, modes = [False], []
    backward = run.trainer._backward

    def step(*args):
        stepping[0] = True
        loss = backward(*args)
        stepping[0] = False
        return loss

    def record(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        modes.append((module.training, stepping[0] and torch.is_grad_enabled()))

    run.trainer._backward = step
    layer = next(m for name, m in run.method.objective.adapters.model.named_modules() if name.endswith("layer.1"))
    layer.register_forward_hook(record)
    for task in range(2):
        run.learn(task)
        run.method.predict(run.data.test.batch([0, 1]), SimpleNamespace(labels=range(4), tasks=None))
    assert (True, True) in modes
    assert {training is in_step for training, in_step in modes} == {True}


# The head's input


def test_dropout_of_the_heads_input_is_on_in_training_only(make) -> None:
    """In training a share of the input is 0 and the rest is scaled up."""
    run = make("method=sequential", "model.head_dropout=0.5")
    objective, batch = run.method.objective, run.data.test.batch([0, 1, 2])
    with torch.no_grad():
        plain = objective.features(batch)
        objective.adapters.train_mode(True)
        dropped = objective.features(batch)
        objective.adapters.train_mode(False)
        assert torch.equal(objective.features(batch), plain)
    nonzero = dropped != 0
    assert 0.25 < nonzero.float().mean() < 0.75
    assert torch.allclose(dropped[nonzero], 2 * plain[nonzero])


def test_pooled_representation_is_the_networks_pooler_output(make) -> None:
    """BERT: tanh(W h + b) of the first token, also if virtual tokens precede it."""
    run = make("method=sequential", "model.representation=pooled")
    objective, batch = run.method.objective, run.data.test.batch([0, 1, 2])
    model = objective.adapters.model
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        first = output.last_hidden_state[:, 0]
        expected = torch.tanh(first @ model.pooler.dense.weight.T + model.pooler.dense.bias)
        assert torch.allclose(
            objective.features(batch), expected.float(), atol=1e-2 if first.dtype != torch.float32 else 1e-6
        )
    prompted = make("method=l2p", "model.representation=pooled").method.objective
    with torch.no_grad():
        output = prompted.adapters.model(**prompted.inputs(batch))
        assert not torch.equal(prompted.features(batch), output.pooler_output.float())


def test_pooled_representation_needs_a_pooler(make, tmp_path: Path) -> None:
    """An architecture may have none; the weights of a masked language model lack it."""
    with pytest.raises(ModelError, match="model tiny_t5 has no pooler: use cls, mean or last"):
        make("method=sequential", "model=tiny_t5", "model.representation=pooled")
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the weights of local have no pooler: use cls"):
        make("method=sequential", "model=local", f"model.path={tmp_path}", "model.representation=pooled")


def test_head_dropout_needs_a_head(words: Path, clpet) -> None:
    result = clpet(
        "train",
        *tiny_args(words),
        "model=tiny_t5",
        "method=sequential",
        "objective=text_to_text",
        "model.head_dropout=0.1",
    )
    assert result.code == 2
    assert "model.head_dropout is for classification; objective=text_to_text has no head" in result.err
