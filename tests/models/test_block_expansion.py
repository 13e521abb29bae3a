"""Block expansion: new blocks change no logits at first, and only they are trained. Dropout of the backbone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from clpet.errors import ModelError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.memory_saving import enable_recomputation
from clpet.models.peft_options import Blocks, Lora
from tests.conftest import domain_args, tiny_args

SMALL = {"vocab_size": 266, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 64}  # fmt: skip
SHAPES = {
    "llama": {"model_type": "llama", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8, "num_key_value_heads": 4},
    "gpt2": {"model_type": "gpt2", "vocab_size": 266, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
}
IDS = torch.tensor([[5, 9, 77, 130, 12, 40, 8, 200]])


def network(shape: str) -> tuple[Backbone, transformers.PreTrainedModel]:
    targets = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(shape, ["q_proj", "v_proj"])
    backbone = Backbone(
        name=shape, architecture=Architecture.decoder, config=SHAPES[shape], random_weights=True, targets=targets
    )
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    return backbone, model


@pytest.mark.parametrize("shape", SHAPES)
def test_new_blocks_and_new_adapters_do_not_change_logits(shape: str) -> None:
    """Oracle 16; a copy after every second of four blocks has its own layer in the generation cache."""
    backbone, model = network(shape)
    with torch.inference_mode():
        before, generated = model(IDS).logits, model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    adapters = Adapters(model, backbone, Blocks(every=2), generates=True)
    adapters.add("default", 0)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, before)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), generated)
    assert model.config.num_hidden_layers == 6
    copies = {name for name in adapters.tensors("default") if {"2", "5"} & set(name.split("."))}
    assert copies == set(adapters.tensors("default"))
    assert {name for name, value in model.named_parameters() if value.requires_grad} == copies

    backbone, model = network(shape)
    adapters = Adapters(model, backbone, Lora(r=4), generates=True)
    adapters.add("default", 0)
    with torch.inference_mode():
        assert torch.equal(adapters.model(IDS).logits, before)


def test_unsupported_blocks_are_rejected() -> None:
    backbone = Backbone(name="bert", random_weights=True, config={"model_type": "bert", **SMALL})
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0)
    with pytest.raises(ModelError, match="not those of bert"):
        Adapters(model, backbone, Blocks())
    backbone, model = network("llama")
    with pytest.raises(ModelError, match=r"peft.every=5, but the model has only 4 blocks"):
        Adapters(model, backbone, Blocks(every=5))


def test_only_the_new_blocks_learn_and_the_model_is_saved(prose: Path, clpet, tmp_path: Path) -> None:
    """The full model is saved and loads without clpet."""
    args = domain_args(prose, "peft=blocks", "peft.every=1", "output_dir=out")
    assert clpet("train", "method=sequential", *args).code == 0
    (run,) = tmp_path.glob("out/*/*/s*")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "adapters" / "model")
    layers = model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 2 * 2
    assert all(layers[index].mlp.down_proj.weight.abs().sum() > 0 for index in (1, 3))
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)
    evaluated = clpet("eval", str(run))
    assert evaluated.code == 0, evaluated.err


def test_per_block_lists_of_a_config_include_the_copies(tmp_path: Path) -> None:
    """SmolLM3 lists the blocks without rotary positions; a GPT-2 that scales by block index is rejected."""
    values = {**SMALL, "num_key_value_heads": 4, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0}
    backbone = Backbone(name="smol", architecture=Architecture.decoder, random_weights=True,
                        config={"model_type": "smollm3", **values})  # fmt: skip
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    with torch.inference_mode():
        before = model(IDS).logits
    Adapters(model, backbone, Blocks(every=2), generates=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.allclose(loaded(IDS).logits, before, atol=1e-6)
    assert loaded.config.no_rope_layers == [1, 0, 0, 1, 0, 0]
    scaled = {**SHAPES["gpt2"], "scale_attn_by_inverse_layer_idx": True}
    backbone = Backbone(name="gpt2", architecture=Architecture.decoder, random_weights=True, config=scaled)
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        Adapters(model, backbone, Blocks(every=2), generates=True)


@pytest.mark.parametrize("uses_dropout", [True, False])
def test_recomputation_keeps_or_disables_dropout(uses_dropout: bool) -> None:
    """OPT's blocks apply dropout themselves, at a rate they store."""
    values = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3}
    backbone = Backbone(name="opt", architecture=Architecture.decoder, random_weights=True,
                        config={"model_type": "opt", **values})  # fmt: skip
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    enable_recomputation(model, uses_dropout)
    assert {block.dropout for block in model.model.decoder.layers} == {0.3 if uses_dropout else 0.0}


def test_base_model_does_not_depend_on_the_dropout_of_a_run(prose: Path, clpet, tmp_path: Path) -> None:
    args = ["train", "method=sequential", *domain_args(prose, "benchmark.base=birds", "cache_dir=cache")]
    assert clpet(*args, "model.dropout=0.2", "output_dir=dropped").code == 0
    (folder,) = (path.parent for path in tmp_path.glob("cache/base/*/config.json"))
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0
    first = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert clpet(*args, "output_dir=plain").code == 0
    assert (folder / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(("overrides", "message"), [
    (["method=dynamic_conpet", "peft=blocks"], "needs an adapter per task and cannot run with peft=blocks"),
    (["method=sequential", "peft=blocks"], "not those of bert"),
    (["method=sequential", "model.dropout=1"], "model.dropout must be auto, own, off or a rate in [0, 1), not 1"),
])  # fmt: skip
def test_refusals(overrides: list[str], message: str, words: Path, clpet) -> None:
    result = clpet("train", *tiny_args(words), *overrides)
    assert result.code == 2
    assert message in result.err


def test_dropout_option_sets_the_rate_in_training(tmp_path: Path) -> None:
    """For a saved network and for random weights; two passes differ in training only."""
    backbone, model = network("gpt2")
    model.save_pretrained(tmp_path)
    from clpet.models.backbone import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    saved = Backbone(name="saved", path=str(tmp_path), architecture=Architecture.decoder, dropout=0.2)
    random = Backbone(**{**vars(backbone), "dropout": 0.2})
    for source in (saved, random):
        model, _ = source.load(torch.float32, torch.device("cpu"), 0, generates=True)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
