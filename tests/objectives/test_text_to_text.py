"""text_to_text on four architectures: batches give the answers of single examples at the expected cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.config.schema import Decode, EvaluationOptions
from clpet.data.batches import IGNORED
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.sources import Table
from clpet.data.traits import ANSWERS
from clpet.errors import ConfigError
from clpet.methods.components.subspace import InputCovariances
from clpet.metrics.text_scores import accuracy, exact_match, rouge_l
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.peft_options import FullFineTuning, Lora
from clpet.objectives.answer_encoding import encode_answers, end_token
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.text_to_text import TextToText
from clpet.runtime.hardware import Device, Dtype, Hardware
from tests.conftest import shared

COMMON = {"vocab_size": 266, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES = {
    "t5": (Architecture.encoder_decoder, ["q", "v"],
           {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": 0, "dropout_rate": 0.0}),
    "llama": (Architecture.decoder, ["q_proj", "v_proj"],
              {"model_type": "llama", **LLAMA, "max_position_embeddings": 256}),
    "gpt2": (Architecture.decoder, ["c_attn"],
             {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen3": (Architecture.decoder, ["q_proj", "v_proj"],
              {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 1, "head_dim": 16,
               "max_position_embeddings": 256}),
}  # fmt: skip
LABELS = ["good", "bad", "so so"]
TEXTS = ["a", "a rather long text that continues", "four words are here", "xyzzy and more", "no"]


def benchmark() -> Benchmark:
    examples = [Example(text, LABELS[i % 3], {"instruction": "Judge" * (1 + i % 2)}) for i, text in enumerate(TEXTS)]
    free = [Example("say it", "anything at all", {"instruction": "Talk"})]
    tasks = [
        Task("judge", examples, examples, examples, tuple(LABELS), "exact_match"),
        Task("talk", free, free, free, (), "rouge_l"),
    ]
    return Benchmark("made_up", tasks, "{instruction}: {text} ->", 96, 24)


def make_objective(
    shape: str, decode: Decode = Decode.generate, adapter: FullFineTuning | None = None, **options
) -> TextToText:
    architecture, targets, config = SHAPES[shape]
    backbone = Backbone(
        name=shape, architecture=architecture, targets=targets, random_weights=True, config={**COMMON, **config}
    )
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    with torch.no_grad():  # with the usual random weights every answer repeats one token
        for parameter in model.parameters():
            parameter.mul_(4)
    adapters = Adapters(model, backbone, adapter or Lora(name="lora", r=2), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    return TextToText("text_to_text").setup(
        benchmark(),
        backbone,
        adapters,
        tokenizer,
        0,
        hardware,
        EvaluationOptions(decode=decode, max_new_tokens=8, **options),
    )


def plain_logits(objective: TextToText, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[answer length, vocabulary] of one example, without padding, cache or position ids."""
    model = objective.adapters.model
    if objective.causal:
        return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    before = torch.tensor([[objective.start, *answer[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=before).logits[0]


def plain_greedy(objective: TextToText, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy answer of one example; every step runs the full text through the network."""
    answer: list[int] = []
    while len(answer) < max_tokens:
        token = int(plain_logits(objective, prompt, [*answer, 0])[-1].argmax())
        if token in objective.ends:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_batched_answers_equal_one_at_a_time(shape: str) -> None:
    objective = make_objective(shape)
    pool = objective.encode().test
    batch = pool.batch(range(len(pool)))
    assert batch.padded
    expected = [plain_greedy(objective, pool.tokens(row).tolist(), 8) for row in range(len(pool))]
    assert len({tuple(ids) for ids in expected}) > 2  # the prompts matter
    texts = [objective.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert objective.predict(batch, AnswerSpace([])).texts == texts


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_batched_ranking_equals_one_at_a_time_and_costs_two_passes(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_objective(shape, Decode.rank)
    pool = objective.encode().test
    batch = pool.batch(pool.rows_of(0))
    expected = torch.zeros(len(batch), 3)
    answers = encode_answers(objective.tokenizer, objective.benchmark.labels, 24).rows
    for row in range(len(batch)):
        for label, answer in enumerate(answers):
            scores = plain_logits(objective, pool.tokens(row).tolist(), answer).log_softmax(-1)
            expected[row, label] = scores[range(len(answer)), answer].sum()
    torch.testing.assert_close(objective.rank(batch, [0, 1, 2]), expected, rtol=1e-4, atol=1e-4)
    calls: list[int] = []
    backbone = objective.adapters.model.base_model.model
    stacks = [backbone.encoder, backbone.decoder] if shape == "t5" else [backbone]
    for module in stacks:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    texts = objective.predict(batch, AnswerSpace([])).texts
    assert len(calls) == 2
    assert texts == [objective.benchmark.labels[i] for i in expected.argmax(1).tolist()]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_over_answer_tokens_only(shape: str) -> None:
    objective = make_objective(shape)
    pool = objective.encode().train
    rows = range(len(pool))
    total, count = 0.0, 0
    for row in rows:
        answer = pool.answer[row].tolist()
        assert [answer[-1]] == objective.ends
        logits = plain_logits(objective, pool.tokens(row).tolist(), answer)
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    loss = objective.loss(pool.batch(rows))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert pool.weights.sum() == count
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in objective.adapters.tensors("default").values())


def test_micro_batches_are_weighted_by_answer_tokens() -> None:
    objective = make_objective("llama")
    pool = objective.encode().train
    rows = list(range(len(pool)))
    full = objective.loss(pool.batch(rows))
    micro_batches = [rows[:2], rows[2:]]
    weights = [pool.weights[micro_batch].sum() / pool.weights[rows].sum() for micro_batch in micro_batches]
    total = sum(
        objective.loss(pool.batch(micro_batch)) * weight
        for micro_batch, weight in zip(micro_batches, weights, strict=True)
    )
    assert total.item() == pytest.approx(full.item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_padded_on_the_side_that_is_not_continued(shape: str) -> None:
    objective = make_objective(shape)
    pool = objective.encode().train
    batch = pool.batch(range(len(pool)))
    assert batch.left is (shape != "t5")
    last = batch.input_ids[:, -1]
    assert (last != 0).all() if batch.left else (last == 0).any()
    selected = batch.select(torch.tensor([0, 4]))
    assert selected.input_ids.shape[1] == int(selected.attention_mask.sum(1).max())
    assert selected.references == [("good",), ("bad",)]
    for row in (0, 1):
        mask = selected.attention_mask[row].bool()
        assert selected.input_ids[row][mask].tolist() == pool.tokens([0, 4][row]).tolist()
    decoded = objective.tokenizer.decode(pool.tokens(1), skip_special_tokens=True)
    assert decoded == f"JudgeJudge: {TEXTS[1]} ->"
    assert (batch.targets == IGNORED).any()


def test_long_text_is_truncated_inside_the_prompt() -> None:
    objective = make_objective("llama")
    row = objective.encode_split([Example("x" * 500, "good", {"instruction": "Judge"})], [0], [0]).tokens(0)
    text = objective.tokenizer.decode(row, skip_special_tokens=True)
    assert len(row) == 96
    assert text.startswith("Judge: xxx")
    assert text.endswith("x ->")


def test_truncated_answers_keep_their_end_token() -> None:
    objective = make_objective("llama")
    ids = encode_answers(objective.tokenizer, ["abcdef", "ab"], 4).rows
    assert [len(row) for row in ids] == [4, 3]
    assert {row[-1] for row in ids} == {end_token(objective.tokenizer)}


def test_encoders_are_rejected() -> None:
    backbone = Backbone(name="bert", random_weights=True, config={"model_type": "bert"})
    with pytest.raises(ConfigError, match="encoder and cannot write an answer"):
        TextToText().check(backbone, Lora("lora"), EvaluationOptions())


def test_metrics() -> None:
    assert exact_match(" World! ", ["world"]) == 1
    assert exact_match("Science or Technology", ["science-or technology"]) == 0
    assert exact_match("b", ["a", "B"]) == 1
    assert accuracy("POS ", ["pos"]) == 1
    assert accuracy("pos.", ["pos"]) == 0
    # longest common subsequence 3 of 4 words each: precision = recall = 3/4
    assert rouge_l("the cat sat down", ["the cat sat up"]) == pytest.approx(0.75)
    # stemmed: running = run; best over references
    assert rouge_l("running", ["other", "run"]) == pytest.approx(1.0)
    assert rouge_l("", ["word"]) == 0


def test_ranked_label_must_equal_a_reference() -> None:
    """decode=rank compares exactly: `B` is wrong for `b` although the metric ignores case; any reference may match."""
    objective = make_objective("llama", Decode.rank)
    rows = [("B", ("b",)), ("b", ("b",)), ("c", ("b", "c"))]
    examples = [Example("x", target[0], {"instruction": "Judge"}, references=target) for _, target in rows]
    pool = objective.encode_split(examples, [0] * 3, [0] * 3)
    answers = Predictions(texts=[text for text, _ in rows])
    assert objective.score(pool.batch(range(3)), answers, AnswerSpace([]))["score"].tolist() == [0, 1, 1]
    objective.evaluation.decode = Decode.generate
    assert objective.score(pool.batch(range(3)), answers, AnswerSpace([]))["score"].tolist() == [1, 1, 1]


def test_ranking_needs_tasks_with_labels() -> None:
    """Raises an error instead of falling back to generation."""
    with pytest.raises(ConfigError, match="task talk has free-text answers"):
        TextToText().check_benchmark(benchmark(), EvaluationOptions(decode=Decode.rank))
    TextToText().check_benchmark(benchmark(), EvaluationOptions())


def test_real_model_gives_the_same_answers_in_batches_and_alone() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("weights", "base-5.9M")
    backbone = Backbone(name="base", path=str(folder), architecture=Architecture.decoder, targets=["q_proj", "v_proj"])
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    adapters = Adapters(model, backbone, Lora(name="lora", r=2), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    objective = TextToText().setup(
        benchmark(), backbone, adapters, tokenizer, 0, hardware, EvaluationOptions(max_new_tokens=10)
    )
    pool = objective.encode().test
    texts = objective.predict(pool.batch(range(len(pool))), AnswerSpace([])).texts
    plain, reader = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row in range(len(pool)):
        ids = torch.tensor([pool.tokens(row).tolist()])
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert reader.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip() == texts[row]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
@pytest.mark.parametrize("decode", ["generate", "rank"])
def test_command_line(clpet, tmp_path: Path, model: str, decode: str) -> None:
    folder = tmp_path / "qa"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 6)):
        rows = [
            {"question": f"say {'ab'[i % 2]} {i}", "answer": "ab"[i % 2], "kind": "ab"[i % 2]} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = clpet(
        "train", "benchmark=files", f"data_dir={folder}", "objective=text_to_text", "text=question", "label=answer",
        "benchmark.prompt='Kind {kind}. {text}'", f"model={model}", "method=sequential", f"evaluation.decode={decode}",
        "benchmark.max_target=4", "train.epochs=12", "train.lr=1e-2", "peft=none", "tracking=off",
    )  # fmt: skip
    assert result.code == 0, result.err
    results = json.loads(next(tmp_path.glob("outputs/**/results.json")).read_text())
    assert results["average"] > 80
    assert results["scores"][1] == results["task_scores"][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_covariances_exclude_padding(shape: str) -> None:
    """C of the first adapted layer's input over a padded batch equals C over its examples one by one."""
    objective = make_objective(shape)
    pool = objective.encode().train
    name, layer = next(
        (n, m) for n, m in objective.adapters.model.named_modules() if n.endswith((".q", "q_proj", "c_attn"))
    )
    with InputCovariances({name: layer}) as padded, torch.no_grad():
        batch = pool.batch(range(len(pool)))
        padded.begin(*objective.masks(batch))
        objective.logits(batch)
    with InputCovariances({name: layer}) as single, torch.no_grad():
        for row in range(len(pool)):
            single.begin()
            objective.logits(pool.batch([row]))
    torch.testing.assert_close(padded.covariances[name].mean(), single.covariances[name].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "peft", "decode"),
    [("tiny_llama", "prompt", "generate"), ("tiny_t5", "prompt", "rank"), ("tiny_llama", "prefix", "rank")],
)
def test_unsupported_virtual_tokens_are_rejected(clpet, model: str, peft: str, decode: str) -> None:
    result = clpet("train", "method=sequential", "benchmark=superni", f"model={model}", f"peft={peft}",
                  f"evaluation.decode={decode}", "tracking=off")  # fmt: skip
    assert result.code == 2
    assert f"peft={peft}" in result.err


def test_rank_batches_shrink_by_the_number_of_labels() -> None:
    objective = make_objective("llama", Decode.rank)
    pool = objective.encode().test
    objective.eval_batch_size = 6
    assert [len(rows) for rows in objective.batches(pool, pool.rows_of(0))] == [2, 2, 1]
    assert all(len(set(pool.tasks[rows])) == 1 for rows in objective.batches(pool, np.arange(len(pool))))


def test_answers_that_do_not_repeat_are_free_text(tmp_path: Path) -> None:
    """Sums scored by exact match are free text; two answers that repeat are labels."""
    rows = [
        {"text": f"{i} + 1", "sum": str(i + 1), "odd": str(i % 2 == 0), "references": f"{i + 1}"} for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"name": "sums"}
    free = (
        Table(label="sum", references="references", **table)
        .reading_for("text_to_text", ANSWERS)
        .load(str(tmp_path))
        .tasks[0]
    )
    assert free.labels == ()
    assert (len(free.test), len(free.validation), len(free.train)) == (10, 3, 27)
    assert free.train[0].references == (free.train[0].target,)
    assert Table(label="odd", **table).reading_for("text_to_text", ANSWERS).load(str(tmp_path)).tasks[0].labels == (
        "False",
        "True",
    )
