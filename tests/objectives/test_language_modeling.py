"""Perplexity, packed windows and chunked cross-entropy against numbers by hand and against a loop over single texts."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.config.schema import CapUnit, EvaluationOptions
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.packing import Masking, eval_windows
from clpet.data.token_cache import Stream
from clpet.data.traits import PLAIN_TEXT
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.peft_options import FullFineTuning, Lora
from clpet.objectives import chunked_cross_entropy
from clpet.objectives.base import AnswerSpace
from clpet.objectives.language_modeling import LanguageModeling, capped, perplexity
from clpet.runtime.hardware import Device, Dtype, Hardware
from tests.conftest import shared

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 266, "hidden_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 32, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 266, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "bert": {"model_type": "bert", "vocab_size": 266, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 32, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "roberta": {"model_type": "roberta", "vocab_size": 266, "hidden_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0},
}  # fmt: skip
TEXTS = {"birds": ["the wren sings at dawn in a hedge", "owls hunt by night", "a heron waits"],
         "metals": ["iron rusts in wet air", "gold does not, however old it is", "tin is soft"]}  # fmt: skip


def domains(length: int = 12, document_mask: bool = False, base: bool = False) -> Benchmark:
    tasks = []
    for name, texts in TEXTS.items():
        splits = [[Example(text) for text in texts] * copies for copies in (4, 1, 1)]
        tasks.append(Task(name, *splits, metric="perplexity"))
    base_task = tasks[0] if base else None
    return Benchmark(
        "made_up", tasks, max_length=length, document_mask=document_mask, base=base_task, traits=PLAIN_TEXT
    )


def make_objective(
    kind: str = "llama",
    benchmark: Benchmark | None = None,
    adapter: FullFineTuning | None = None,
    dtype: Dtype = Dtype.fp32,
    **evaluation: Any,
) -> LanguageModeling:
    """A tiny model with fp32 random weights, full fine-tuning unless an adapter is given."""
    architecture = Architecture.encoder if kind in ("bert", "roberta") else Architecture.decoder
    backbone = Backbone(name=kind, random_weights=True, config=SHAPES[kind], architecture=architecture)
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    adapters = Adapters(model, backbone, adapter or FullFineTuning(), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=dtype)
    settings = EvaluationOptions(**evaluation)
    return LanguageModeling().setup(benchmark or domains(), backbone, adapters, tokenizer, 0, hardware, settings)


def sums(objective: LanguageModeling, data: Encoded, task: int, batch_size: int = 128) -> tuple[float, float]:
    """(nll, tokens) of a domain's test text."""
    objective.eval_batch_size = batch_size
    nll = tokens = 0.0
    with torch.inference_mode():
        for rows in objective.batches(data.test, data.test.rows_of(task)):
            batch = data.test.batch(rows)
            extras = objective.predict(batch, AnswerSpace([])).extras
            nll, tokens = nll + float(extras["nll"].sum()), tokens + float(extras["tokens"].sum())
    return nll, tokens


def plain_nll(model: Any, ids: list[int]) -> list[float]:
    """-log p of every token but the first, for one text, from unchunked logits."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


# Perplexity


def test_perplexity_is_weighted_by_tokens() -> None:
    documents = [[0.1, 0.2, 0.3], [1], [2, 2]]
    nll, tokens = sum(map(sum, documents)), sum(map(len, documents))
    assert perplexity(nll, tokens) == pytest.approx(2.542972, abs=1e-6)
    score = make_objective().aggregate({"nll": np.array([0.6, 1, 4]), "tokens": np.array([3, 1, 2])})
    assert score.value == pytest.approx(2.542972, abs=1e-6)  # not 3.776247 nor 2.905678
    assert (score.correct, score.total) == (pytest.approx(5.6), 6)
    uneven = make_objective().aggregate({"nll": np.array([6, 1.5, 6]), "tokens": np.array([3, 3, 2])})
    assert uneven.value == pytest.approx(5.405949, abs=1e-6)  # not 5.625291


def test_logits_in_bf16_leave_autocast_off() -> None:
    objective = make_objective(dtype=Dtype.bf16)
    objective.logits(objective.encode().train.batch([0, 1]))
    assert not torch.is_autocast_enabled("cpu")


def test_uniform_logits_have_the_perplexity_of_the_vocabulary_and_eight_bits_per_byte() -> None:
    head = torch.nn.Linear(4, 50257, bias=False)
    torch.nn.init.zeros_(head.weight)
    nll = chunked_cross_entropy.token_nll(torch.randn(7, 4), torch.arange(7), head)
    assert nll.mean().item() == pytest.approx(10.824905, abs=1e-5)
    rows = {"nll": np.full(3, 10 * math.log(256)), "tokens": np.full(3, 10.0), "bytes": np.full(3, 10.0)}
    assert make_objective().diagnostics(rows)["bits_per_byte"] == pytest.approx(8)
    assert make_objective().aggregate(rows).value == pytest.approx(256)


def test_perplexity_that_overflows_is_the_largest_float() -> None:
    assert perplexity(1e6, 1) == sys.float_info.max


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_windows_equal_a_loop_over_single_windows(kind: str) -> None:
    objective = make_objective(kind)
    data = objective.encode()
    for task, texts in enumerate(TEXTS.values()):
        ids: list[int] = []
        for text in texts:
            ids += objective.tokenizer(text)["input_ids"]
        expected = [
            v for start in range(0, len(ids), 12) for v in plain_nll(objective.adapters.model, ids[start : start + 12])
        ]
        num_windows = math.ceil(len(ids) / 12)
        nll, tokens = sums(objective, data, task)
        assert tokens == len(ids) - num_windows == len(expected)
        assert nll == pytest.approx(sum(expected), rel=1e-5)
        for batch_size in (1, 2, 5):
            assert sums(objective, data, task, batch_size) == (pytest.approx(nll, rel=1e-6), tokens)


def test_stride_predicts_every_token_but_the_first_with_the_longest_context() -> None:
    objective = make_objective(stride=4)
    data = objective.encode()
    ids = [t for text in TEXTS["birds"] for t in objective.tokenizer(text)["input_ids"]]
    expected = plain_nll(objective.adapters.model, ids[:12])
    for end in range(16, len(ids) + 4, 4):
        stop = min(end, len(ids))
        expected += plain_nll(objective.adapters.model, ids[end - 12 : stop])[-(stop - end + 4) :]
    nll, tokens = sums(objective, data, 0)
    assert tokens == len(ids) - 1 == len(expected)
    assert nll == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("stride", [None, 4])
def test_with_a_bos_token_all_text_is_predicted(stride: int | None) -> None:
    """Every window begins with [CLS], so every token of the text is predicted and all bytes count."""
    objective = make_objective(stride=stride, bos=True)
    data = objective.encode()
    ids = [t for text in TEXTS["birds"] for t in objective.tokenizer(text)["input_ids"]]
    step, expected = stride or 11, plain_nll(objective.adapters.model, [2, *ids[:11]])
    for end in range(11 + step, len(ids) + step, step):
        stop = min(end, len(ids))
        expected += plain_nll(objective.adapters.model, [2, *ids[end - 11 : stop]])[-(stop - end + step) :]
    nll, tokens = sums(objective, data, 0)
    assert tokens == len(ids) == len(expected)
    assert nll == pytest.approx(sum(expected), rel=1e-5)
    rows = data.test.rows_of(0)
    assert sum(data.test.bytes(row) for row in rows) == sum(len(text.encode()) for text in TEXTS["birds"])
    assert data.test.batch(rows[:2]).input_ids[:, 0].tolist() == [2, 2]
    assert data.train.batch([0]).input_ids[0].tolist() == ids[:12]


def test_last_window_of_one_token_is_left_out() -> None:
    starts, lengths, skips = eval_windows(65, 16)
    assert starts.tolist() == [0, 16, 32, 48]
    assert (lengths - skips).sum() == 60
    assert (eval_windows(66, 16)[1] - eval_windows(66, 16)[2]).sum() == 66 - 5
    assert eval_windows(1, 16)[0].size == 0
    assert eval_windows(0, 16)[0].size == 0


def test_real_model_agrees_with_a_plain_loop() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("weights", "stories260K")
    backbone = Backbone(name="stories", path=str(folder), architecture=Architecture.decoder)
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    adapters = Adapters(model, backbone, FullFineTuning(), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    benchmark = domains(length=16)
    objective = LanguageModeling().setup(benchmark, backbone, adapters, tokenizer, 0, hardware, EvaluationOptions())
    nll, tokens = sums(objective, objective.encode(), 1)
    plain, reader = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [t for text in TEXTS["metals"] for t in [*reader(text)["input_ids"], reader.eos_token_id]]
    expected = [v for start in range(0, len(ids), 16) for v in plain_nll(plain, ids[start : start + 16])]
    assert perplexity(nll, tokens) == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)


# Packing


def test_cap_counts_tokens_or_bytes() -> None:
    stream = Stream(np.arange(6), np.empty(0, np.int64), np.array([0, 2, 2, 3, 1, 1], np.float32))
    assert capped(stream, None, CapUnit.tokens) is None
    assert capped(stream, 4, CapUnit.tokens) == 4
    assert capped(stream, 4, CapUnit.bytes) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_isolated_documents_are_scored_like_separate_documents(kind: str) -> None:
    objective = make_objective(kind, domains(length=100, document_mask=True))
    data = objective.encode()
    batch = data.test.batch([0])
    if kind in ("llama", "gpt2"):
        expected = [
            v
            for text in TEXTS["birds"]
            for v in plain_nll(objective.adapters.model, objective.tokenizer(text)["input_ids"])
        ]
        nll, tokens = sums(objective, data, 0)
        assert tokens == len(expected)
        assert nll == pytest.approx(sum(expected), rel=1e-5)
        assert data.test.weights[0] == len(expected)
        return
    # A masked model: changing a token of the second document does not change the states of the first.
    states = {}
    with torch.inference_mode(), torch.no_grad():
        for changed in (None, 60):
            ids = batch.input_ids.clone()
            if changed:
                ids[0, changed] = 20
            inputs = objective.inputs(batch)
            states[changed] = objective.adapters.model(**{**inputs, "input_ids": ids}).logits[0, :35]
            separate = objective.adapters.model(input_ids=ids[:, :35]).logits[0]
            assert torch.allclose(states[changed], separate, atol=1e-5)


def test_masked_evaluation_positions_are_the_same_for_every_call_and_batch_size() -> None:
    objective = make_objective("bert")
    data = objective.encode()
    rows = data.test.rows_of(0)
    batch = data.test.batch(rows)
    repeated = data.test.batch(rows)
    assert torch.equal(batch.target_positions, repeated.target_positions)
    assert (batch.input_ids.view(-1)[batch.target_positions] == objective.tokenizer.mask_token_id).all()
    length = batch.input_ids.shape[1]
    singles = [data.test.batch([row]) for row in rows]
    assert torch.cat([single.target_ids for single in singles]).tolist() == batch.target_ids.tolist()
    assert [
        (positions % length).tolist()
        for positions in batch.target_positions.split([len(single.target_positions) for single in singles])
    ] == [single.target_positions.tolist() for single in singles]
    assert data.test.weights[rows].sum() == len(batch.target_positions)
    nll, tokens = sums(objective, data, 0)
    assert sums(objective, data, 0, 1) == (pytest.approx(nll, rel=1e-5), tokens)
    assert {task.metric for task in objective.benchmark.tasks} == {"pseudo_perplexity"}
    assert objective.benchmark.direction == "lower"
    assert objective.diagnostics({"bytes": np.ones(1), "nll": np.ones(1)}) == {}  # bits per byte are for causal models


def test_training_draws_new_masks_for_every_batch() -> None:
    masking = Masking(4, np.array([2, 3]), 266, seed=0, training=True)
    ids = np.arange(10, 60)
    torch.manual_seed(0)
    draws = [tuple(masking.apply(ids)[1]) for _ in range(4)]
    torch.manual_seed(0)
    assert [tuple(masking.apply(ids)[1]) for _ in range(4)] == draws
    assert len(set(draws)) == 4
    assert {len(draw) for draw in draws} == {round(0.15 * 50)}


# Chunks


def test_chunked_loss_and_gradients_equal_the_unchunked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    states, targets = torch.randn(23, 8, requires_grad=True), torch.randint(50, (23,))
    monkeypatch.setitem(chunked_cross_entropy.CHUNK, "cpu", 5 * 50)
    not_plain = type("OtherLinear", (torch.nn.Linear,), {})(8, 50)
    for head in (torch.nn.Linear(8, 50), torch.nn.Linear(8, 50, bias=False), not_plain):
        leaves = [states, *head.parameters()]
        reference = F.cross_entropy(head(states), targets)
        expected = torch.autograd.grad(reference, leaves)
        loss = chunked_cross_entropy.mean_nll(states, targets, head)
        assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
        for actual, gradient in zip(torch.autograd.grad(3 * loss, leaves), expected, strict=True):
            assert torch.allclose(actual, 3 * gradient, atol=1e-6)
        per_token = chunked_cross_entropy.token_nll(states, targets, head)
        assert torch.allclose(per_token, F.cross_entropy(head(states), targets, reduction="none"), atol=1e-6)


def test_loss_without_targets_is_zero_and_a_frozen_head_gets_no_gradient() -> None:
    head = torch.nn.Linear(4, 9)
    states = torch.randn(3, 4, requires_grad=True)
    assert chunked_cross_entropy.mean_nll(states[:0], torch.empty(0, dtype=torch.long), head).item() == 0
    head.requires_grad_(False)
    chunked_cross_entropy.mean_nll(states, torch.tensor([1, 2, 3]), head).backward()
    assert states.grad is not None
    assert head.weight.grad is None


@pytest.mark.parametrize("kind", list(SHAPES))
def test_loss_is_the_cross_entropy_of_the_models_logits(kind: str) -> None:
    objective = make_objective(kind)
    batch = objective.encode().train.batch([0, 2])
    logits = objective.adapters.model(**objective.inputs(batch)).logits.flatten(0, 1)
    expected = F.cross_entropy(logits[batch.target_positions - int(objective.causal)], batch.target_ids)
    assert objective.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert F.cross_entropy(objective.logits(batch), objective.targets(batch)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_new_lora_adapter_does_not_change_perplexity() -> None:
    plain, lora = make_objective(), make_objective(adapter=Lora(name="lora", r=2, targets=["q_proj"]))
    assert sums(lora, lora.encode(), 0) == pytest.approx(sums(plain, plain.encode(), 0), rel=1e-5)


@pytest.mark.slow
def test_chunking_halves_the_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    from bench_text import step_memory

    assert step_memory(chunked=True) < 0.5 * step_memory(chunked=False)
