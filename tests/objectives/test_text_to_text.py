"""text_to_text on the four model shapes: batches answer as one example at a time does, and cost what they should."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.config.schema import Decode, EvaluationOptions
from clpet.data.batches import IGNORED
from clpet.data.benchmark import Benchmark, Example, Task
from clpet.data.sources import Kind, Table
from clpet.errors import ConfigError
from clpet.methods.components.subspace import InputCovariances
from clpet.metrics.text_scores import accuracy, exact_match, rouge_l
from clpet.models.adapters import Adapters, FullFineTuning, Lora
from clpet.models.backbone import Architecture, Backbone
from clpet.objectives.base import AnswerSpace, Predictions
from clpet.objectives.text_to_text import TextToText, encode_answers, end_token
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
TEXTS = ["a", "a rather long text that goes on", "four words are here", "xyzzy and more", "no"]


def benchmark() -> Benchmark:
    examples = [Example(text, LABELS[i % 3], {"instruction": "Judge" * (1 + i % 2)}) for i, text in enumerate(TEXTS)]
    free = [Example("say it", "anything at all", {"instruction": "Talk"})]
    tasks = [
        Task("judge", examples, examples, examples, tuple(LABELS), "exact_match"),
        Task("talk", free, free, free, (), "rouge_l"),
    ]
    return Benchmark("made", tasks, "{instruction}: {text} ->", 96, 24)


def objective(
    shape: str, decode: Decode = Decode.generate, adapter: FullFineTuning | None = None, **over
) -> TextToText:
    architecture, targets, config = SHAPES[shape]
    backbone = Backbone(
        name=shape, architecture=architecture, targets=targets, random_weights=True, config={**COMMON, **config}
    )
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    with torch.no_grad():  # random weights of the usual size answer one token for ever
        for parameter in model.parameters():
            parameter.mul_(4)
    adapters = Adapters(model, backbone, adapter or Lora(name="lora", r=2), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    return TextToText(
        benchmark(),
        backbone,
        adapters,
        tokenizer,
        0,
        hardware,
        EvaluationOptions(decode=decode, max_new_tokens=8, **over),
    )


def plain_logits(found: TextToText, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[answer length, vocabulary] of one example, without padding, cache or position ids."""
    model = found.adapters.model
    if found.causal:
        return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    before = torch.tensor([[found.start, *answer[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=before).logits[0]


def plain_greedy(found: TextToText, prompt: list[int], most: int) -> list[int]:
    """Greedy answer of one example, the whole text through the network for every token."""
    answer: list[int] = []
    while len(answer) < most:
        token = int(plain_logits(found, prompt, [*answer, 0])[-1].argmax())
        if token == found.end:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_batched_answers_equal_one_at_a_time(shape: str) -> None:
    found = objective(shape)
    pool = found.encode().test
    batch = pool.batch(range(len(pool)))
    assert batch.padded
    wanted = [plain_greedy(found, pool.tokens(row).tolist(), 8) for row in range(len(pool))]
    assert len({tuple(ids) for ids in wanted}) > 2  # the prompts matter
    texts = [found.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert found.predict(batch, AnswerSpace([])).texts == texts


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_ranking_equals_one_at_a_time_and_costs_two_passes(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = objective(shape, Decode.rank)
    pool = found.encode().test
    batch = pool.batch(pool.rows_of(0))
    wanted = torch.zeros(len(batch), 3)
    answers = encode_answers(found.tokenizer, found.benchmark.labels, 24).rows
    for row in range(len(batch)):
        for label, answer in enumerate(answers):
            scores = plain_logits(found, pool.tokens(row).tolist(), answer).log_softmax(-1)
            wanted[row, label] = scores[range(len(answer)), answer].sum()
    torch.testing.assert_close(found.rank(batch, [0, 1, 2]), wanted, rtol=1e-4, atol=1e-4)
    calls: list[int] = []
    core = found.adapters.model.base_model.model
    watched = [core.encoder, core.decoder] if shape == "t5" else [core]
    for module in watched:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    texts = found.predict(batch, AnswerSpace([])).texts
    assert len(calls) == 2
    assert texts == [found.benchmark.labels[i] for i in wanted.argmax(1).tolist()]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_over_answer_tokens_only(shape: str) -> None:
    found = objective(shape)
    pool = found.encode().train
    rows = range(len(pool))
    total, count = 0.0, 0
    for row in rows:
        answer = pool.answer[row].tolist()
        assert answer[-1] == found.end
        logits = plain_logits(found, pool.tokens(row).tolist(), answer)
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    loss = found.loss(pool.batch(rows))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert pool.weights.sum() == count
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in found.adapters.tensors("default").values())


def test_micro_batches_weigh_by_answer_tokens() -> None:
    found = objective("llama")
    pool = found.encode().train
    rows = list(range(len(pool)))
    whole = found.loss(pool.batch(rows))
    parts = [rows[:2], rows[2:]]
    share = [pool.weights[part].sum() / pool.weights[rows].sum() for part in parts]
    summed = sum(found.loss(pool.batch(part)) * s for part, s in zip(parts, share, strict=True))
    assert summed.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_padded_where_they_are_not_continued(shape: str) -> None:
    found = objective(shape)
    pool = found.encode().train
    batch = pool.batch(range(len(pool)))
    assert batch.left is (shape != "t5")
    last = batch.input_ids[:, -1]
    assert (last != 0).all() if batch.left else (last == 0).any()
    part = batch.select(torch.tensor([0, 4]))
    assert part.input_ids.shape[1] == int(part.attention_mask.sum(1).max())
    assert part.references == [("good",), ("bad",)]
    for row in (0, 1):
        inside = part.attention_mask[row].bool()
        assert part.input_ids[row][inside].tolist() == pool.tokens([0, 4][row]).tolist()
    decoded = found.tokenizer.decode(pool.tokens(1), skip_special_tokens=True)
    assert decoded == f"JudgeJudge: {TEXTS[1]} ->"
    assert (batch.targets == IGNORED).any()


def test_long_text_is_cut_inside_the_prompt() -> None:
    found = objective("llama")
    row = found.encode_split([Example("x" * 500, "good", {"instruction": "Judge"})], [0], [0]).tokens(0)
    text = found.tokenizer.decode(row, skip_special_tokens=True)
    assert len(row) == 96
    assert text.startswith("Judge: xxx")
    assert text.endswith("x ->")


def test_answers_are_cut_with_their_end_kept() -> None:
    found = objective("llama")
    ids = encode_answers(found.tokenizer, ["abcdef", "ab"], 4).rows
    assert [len(row) for row in ids] == [4, 3]
    assert {row[-1] for row in ids} == {end_token(found.tokenizer)}


def test_an_encoder_is_refused() -> None:
    backbone = Backbone(name="bert", random_weights=True, config={"model_type": "bert"})
    with pytest.raises(ConfigError, match="encoder and cannot write an answer"):
        TextToText.check(backbone, "lora", EvaluationOptions())


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


def test_a_chosen_label_is_compared_as_a_label() -> None:
    """Labels that the metric takes for equal are not: `B` for `b` is wrong, a second reference is right."""
    found = objective("llama", Decode.rank)
    rows = [("B", ("b",)), ("b", ("b",)), ("c", ("b", "c"))]
    examples = [Example("x", target[0], {"instruction": "Judge"}, references=target) for _, target in rows]
    pool = found.encode_split(examples, [0] * 3, [0] * 3)
    answers = Predictions(texts=[text for text, _ in rows])
    assert found.score(pool.batch(range(3)), answers, AnswerSpace([])).tolist() == [0, 1, 1]
    found.evaluation.decode = Decode.generate
    assert found.score(pool.batch(range(3)), answers, AnswerSpace([])).tolist() == [1, 1, 1]


def test_ranking_is_refused_where_a_task_has_no_labels() -> None:
    """No mode of evaluation takes the place of another."""
    with pytest.raises(ConfigError, match="task talk has free-text answers"):
        TextToText.check_benchmark(benchmark(), EvaluationOptions(decode=Decode.rank))
    TextToText.check_benchmark(benchmark(), EvaluationOptions())


def test_real_model_answers_alike_in_batches_and_alone() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("weights", "base-5.9M")
    backbone = Backbone(name="base", path=str(folder), architecture=Architecture.decoder, targets=["q_proj", "v_proj"])
    model, tokenizer = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    adapters = Adapters(model, backbone, Lora(name="lora", r=2), generates=True)
    adapters.add("default", 0)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    found = TextToText(benchmark(), backbone, adapters, tokenizer, 0, hardware, EvaluationOptions(max_new_tokens=10))
    pool = found.encode().test
    texts = found.predict(pool.batch(range(len(pool))), AnswerSpace([])).texts
    plain, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row in range(len(pool)):
        ids = torch.tensor([pool.tokens(row).tolist()])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert words.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == texts[row]


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
    found = clpet(
        "train", "benchmark=files", f"data_dir={folder}", "objective=text_to_text", "text=question", "label=answer",
        "benchmark.prompt='Kind {kind}. {text}'", f"model={model}", "method=sequential", f"evaluation.decode={decode}",
        "benchmark.max_target=4", "train.epochs=12", "train.lr=1e-2", "peft=none", "tracking=off",
    )  # fmt: skip
    assert found.code == 0, found.err
    results = json.loads(next(tmp_path.glob("outputs/**/results.json")).read_text())
    assert results["average"] > 80
    assert results["scores"][1] == results["task_scores"][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_leave_padding_out_of_covariances(shape: str) -> None:
    """C of the first adapted layer's input over a padded batch equals C over its examples one by one."""
    found = objective(shape)
    pool = found.encode().train
    name, layer = next(
        (n, m) for n, m in found.adapters.model.named_modules() if n.endswith((".q", "q_proj", "c_attn"))
    )
    with InputCovariances({name: layer}) as padded, torch.no_grad():
        batch = pool.batch(range(len(pool)))
        padded.begin(*found.masks(batch))
        found.logits(batch)
    with InputCovariances({name: layer}) as alone, torch.no_grad():
        for row in range(len(pool)):
            alone.begin()
            found.logits(pool.batch([row]))
    torch.testing.assert_close(padded.covariances[name].mean(), alone.covariances[name].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "peft", "decode"),
    [("tiny_llama", "prompt", "generate"), ("tiny_t5", "prompt", "rank"), ("tiny_llama", "prefix", "rank")],
)
def test_virtual_tokens_are_refused_where_they_would_go_wrong(clpet, model: str, peft: str, decode: str) -> None:
    found = clpet("train", "method=sequential", "benchmark=superni", f"model={model}", f"peft={peft}",
                  f"evaluation.decode={decode}", "tracking=off")  # fmt: skip
    assert found.code == 2
    assert f"peft={peft}" in found.err


def test_rank_batches_are_as_much_smaller_as_there_are_labels() -> None:
    found = objective("llama", Decode.rank)
    pool = found.encode().test
    found.eval_batch_size = 6
    assert [len(part) for part in found.batches(pool, pool.rows_of(0))] == [2, 2, 1]
    assert all(len(set(pool.tasks[part])) == 1 for part in found.batches(pool, np.arange(len(pool))))


def test_answers_that_do_not_come_back_are_no_labels(tmp_path: Path) -> None:
    """Numbers to be computed are answers even where they are scored by exact match; yes and no are labels."""
    rows = [
        {"text": f"{i} + 1", "sum": str(i + 1), "odd": str(i % 2 == 0), "references": f"{i + 1}"} for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"name": "sums", "objective": Kind.text_to_text}
    free = Table(label="sum", references="references", **table).load(str(tmp_path)).tasks[0]
    assert free.labels == ()
    assert (len(free.test), len(free.validation), len(free.train)) == (10, 3, 27)
    assert free.train[0].references == (free.train[0].target,)
    assert Table(label="odd", **table).load(str(tmp_path)).tasks[0].labels == ("False", "True")
