"""Small networks and tokenizers of four architectures: representations, templates, and layers with adapters."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from clpet.config.build import build, parse_config
from clpet.config.compose import conf_dir
from clpet.config.identity import register_resolvers
from clpet.data.benchmark import Example
from clpet.data.template import Template
from clpet.models.adapters import Adapters, parameter_ratio
from clpet.models.backbone import Architecture, Backbone
from clpet.models.peft_options import Lora

TEMPLATE = "{text} In this sentence, {tail} is the {mask} of {head}."
WORDS = ["In", "this", "sentence", "is", "the", "of", "apple", "pear", "iron", "gold", "nile", "rhine"]


def wordpiece() -> Tokenizer:
    """Like BERT: lower case, word pieces, [unusedN] in the vocabulary."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = [word.lower() for word in WORDS]
    vocabulary = {token: i for i, token in enumerate([*special, *words, *pieces, *(f"##{piece}" for piece in pieces)])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return core


def byte_pairs() -> Tokenizer:
    """Like RoBERTa: byte-level pairs that include the space before a word; <mask> absorbs that space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made_up = ["madeupword0000", "madeupword0001", "madeupword0002", "<mask>"]
    pairs = [("Ġ", "i"), ("i", "s"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    merged = [a + b for a, b in pairs]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, *merged, *made_up])}
    core = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    core.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    return core


def sentence_piece() -> Tokenizer:
    """Like LLaMA: spaces become U+2581, one is put before the text, and unknown characters become bytes."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *(chr(c) for c in range(33, 127))]
    pairs = [("▁", "i"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "I"), ("▁I", "n")]
    merged = [a + b for a, b in pairs]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    core = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, pairs, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(special)
    return core


BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>",
           "sep_token": "</s>", "mask_token": AddedToken("<mask>", lstrip=True, special=True)}  # fmt: skip
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES = {
    "bert": (wordpiece, BERT, transformers.BertConfig, {**SMALL, "max_position_embeddings": 128}),
    "minilm": (wordpiece, BERT, transformers.BertConfig,
               {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}),
    "roberta": (byte_pairs, ROBERTA, transformers.RobertaConfig,
                {**SMALL, "max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1}),
    "llama": (sentence_piece, LLAMA, transformers.LlamaConfig, {**SMALL, "max_position_embeddings": 128}),
}  # fmt: skip


def hub_folder(name: str, folder: Path) -> Path:
    """Writes config.json, model.safetensors and tokenizer files of one shape, in the hub's layout."""
    core, special, config, values = SHAPES[name]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core(), **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config(vocab_size=len(tokenizer), **values))
    for parameter in model.parameters():  # outputs then differ at every position, unlike those of an untrained network
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and hub-layout folder of each shape."""
    return request.param, hub_folder(request.param, tmp_path_factory.mktemp(request.param))


def local(shape: tuple[str, Path], *more: str) -> list[str]:
    name, folder = shape
    targets = "[q_proj,k_proj]" if name == "llama" else "[query,value]"
    kind = "decoder" if name == "llama" else "encoder"
    return ["model=local", f"model.path={folder}", f"model.architecture={kind}", f"model.targets={targets}",
            "benchmark.max_length=100", "hardware.dtype=fp32", *more]  # fmt: skip


@pytest.mark.parametrize("representation", ["mask", "mean", "cls", "last"])
def test_representations_are_read_at_the_right_position(representation: str, shape: tuple[str, Path], make) -> None:
    """Equals a forward pass of single examples without padding, read at positions taken from the token ids."""
    run = make(
        "method=sequential",
        *local(shape, f"model.representation={representation}", "benchmark.template='{text} is {mask}.'"),
    )
    objective, pool = run.method.objective, run.data.train
    rows = [0, 1, 2, 30, 31, 70]
    assert len({int(pool.lengths[row]) for row in rows}) > 2
    reference = transformers.AutoModel.from_pretrained(shape[1]).eval()
    mask = {"bert": "[MASK]", "minilm": "[MASK]", "roberta": "<mask>", "llama": "<0x05>"}[shape[0]]
    mask_id = transformers.AutoTokenizer.from_pretrained(shape[1]).convert_tokens_to_ids(mask)
    with torch.inference_mode():
        features = objective.features(pool.batch(rows))
        for row, vector in zip(rows, features, strict=True):
            ids = pool.tokens(row).tolist()
            assert ids.count(mask_id) == 1
            hidden = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
            positions = {"mask": [ids.index(mask_id)], "mean": range(len(ids)), "cls": [0], "last": [len(ids) - 1]}[
                representation
            ]
            torch.testing.assert_close(vector, hidden[list(positions)].mean(0), atol=1e-4, rtol=1e-4)


def test_padding_does_not_change_a_representation(shape: tuple[str, Path], make) -> None:
    """The shortest text alone, in a batch with the longest, and padded beyond the longest."""
    run = make("method=sequential", *local(shape, "benchmark.template='{text} is {mask}.'"))
    objective, pool = run.method.objective, run.data.train
    short, long = int(pool.lengths.argmin()), int(pool.lengths.argmax())
    with torch.inference_mode():
        single = objective.features(pool.batch([short]))[0]
        batched = objective.features(pool.batch([long, short]))[1]
        padded = objective.features(pool.batch([short], width=90))[0]
    torch.testing.assert_close(single, batched, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(single, padded, atol=1e-5, rtol=1e-4)


def test_representation_auto(shape: tuple[str, Path], make) -> None:
    """auto reads the mask of a template that has one; otherwise an encoder's mean or a decoder's last token."""
    masked = make("method=sequential", *local(shape, "benchmark.template='{text} is {mask}.'"))
    assert masked.method.objective.representation.value == "mask"
    plain = make("method=sequential", *local(shape, "benchmark.template='{text}'"))
    assert plain.method.objective.representation.value == ("last" if shape[0] == "llama" else "mean")


def test_adapters_attach_to_the_named_layers_of_every_block(shape: tuple[str, Path], make) -> None:
    run = make("method=sequential", *local(shape))
    layers = [
        name.split(".")
        for name, module in run.method.objective.adapters.model.named_modules()
        if hasattr(module, "lora_A")
    ]
    depth = SHAPES[shape[0]][3]["num_hidden_layers"]
    targets = ("q_proj", "k_proj") if shape[0] == "llama" else ("query", "value")
    assert sorted(path[-1] for path in layers) == sorted(targets * depth)
    assert len({next(module for module in path if module.isdigit()) for path in layers}) == depth


def template(shape: tuple[str, Path], text: str = TEMPLATE, length: int = 100) -> Template:
    backbone = build({"_target_": "clpet.models.backbone.Backbone", "path": str(shape[1])}, "model")
    return Template(backbone.tokenizer(), text, length, "{mask}" in text)


@pytest.mark.parametrize("text", [TEMPLATE, "Of {head} and {tail}: {text} That is the {mask}!"])
def test_templates_are_tokenized_like_one_text(text: str, shape: tuple[str, Path]) -> None:
    """An example that is not truncated has the tokens of its full text: none are added between the parts."""
    built = template(shape, text)
    example = Example("[m0] Rhine [m1] meets the [m2] Nile [m3].", "x", {"head": "Rhine", "tail": "Nile"})
    expected = text.format(text=example.text, mask=built.mask, **example.fields)
    for marker, token in built.markers.items():
        expected = expected.replace(marker, token)
    assert built.encode([example]).rows[0] == built.tokenizer(expected)["input_ids"]


def test_markers_are_one_reserved_token_each(shape: tuple[str, Path]) -> None:
    built = template(shape)
    reserved = {"roberta": ["madeupword0000", "madeupword0001", "madeupword0002", "<unk>"],
                "llama": [f"<0x0{i}>" for i in range(4)]}.get(shape[0], [f"[unused{i}]" for i in range(4)])  # fmt: skip
    row = built.encode([Example("[m0] a [m1] b [m2] c [m3]", "x", {"head": "a", "tail": "b"})]).rows[0]
    ids = [built.tokenizer.convert_tokens_to_ids(token) for token in reserved]
    assert [row.count(marker) for marker in ids] == [1] * 4
    assert [token for token in row if token in ids] == ids


def test_truncated_text_keeps_markers_template_and_special_tokens(shape: tuple[str, Path]) -> None:
    """A long sentence with the entities in the middle, truncated to 80 tokens."""
    built = template(shape, length=80)
    middle = "[m0] apple [m1] of [m2] pear [m3]"
    text = f"{'gold ' * 60}{middle}{' iron' * 60}"
    start = text.index("[m0]")
    row = built.encode([Example(text, "x", {"head": "apple", "tail": "pear"}, ((start, start + len(middle)),))]).rows[0]
    assert len(row) == 80
    assert row.count(built.mask_id) == 1
    assert row[: len(built.head)] + row[len(row) - len(built.tail) :] == built.tokenizer("")["input_ids"]
    decoded = re.sub("▁|Ġ|##", "", "".join(built.tokenizer.convert_ids_to_tokens(row))).lower()
    assert f"inthissentence,pearisthe{built.mask.lower()}ofapple." in decoded
    markers = [built.markers[f"[m{i}]"].lower() for i in range(4)]
    assert "{}apple{}of{}pear{}".format(*markers) in decoded
    assert all(row.count(built.tokenizer.convert_tokens_to_ids(token)) == 1 for token in built.markers.values())


@pytest.mark.parametrize(
    ("model", "lora", "total", "times"),
    [("bert_large", 393_216, 335_141_888, 852.31), ("llama_7b", 2_097_152, 6_738_415_616, 3213.127)],
)
def test_parameter_counts_of_shipped_models(model: str, lora: int, total: int, times: float) -> None:
    """ConPET oracle 1: r = 4 on the targets in the model's YAML, counted without weights."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        backbone = build(parse_config(compose("train", [f"model={model}"])).model, "model")
    with torch.device("meta"):
        adapters = Adapters(backbone.skeleton(), backbone, Lora(r=4, alpha=1))
        adapters.add("default", 0)
    assert adapters.count("default") == lora
    assert adapters.base_parameters == total
    assert parameter_ratio(lora, total)["times_fewer"] == pytest.approx(times, abs=0.005)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "encoder"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "decoder"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "decoder"),
        ({"model_type": "qwen3"}, "decoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder_decoder"),
    ],
)
def test_architecture_of_a_local_model_is_read_from_its_config(config: dict, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = Backbone(name="local", path=str(tmp_path), architecture=Architecture.auto)
    assert backbone.architecture.value == expected
