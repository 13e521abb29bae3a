"""Conversations in text_to_text: the loss on all answers, generation up to an end token, and what is cut."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.config.schema import Decode, EvaluationOptions
from clpet.data.benchmark import Benchmark, Example, Task, Truncate, Turns
from clpet.data.chat_encoding import ChatEncoder, excerpt
from clpet.data.chat_template import ChatTemplate
from clpet.data.conversation import conversation, example_of
from clpet.errors import DataError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.peft_options import Lora
from clpet.objectives.base import AnswerSpace
from clpet.objectives.text_to_text import TextToText
from clpet.runtime.hardware import Device, Dtype, Hardware
from tests.conversations import made_up, tokenizer

TALKS = made_up(8, seed=3)
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
SHAPES = {
    "llama": (["q_proj", "v_proj"], {"model_type": "llama", **LLAMA}),
    "gpt2": (["c_attn"], {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512,
                          "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen3": (["q_proj", "v_proj"], {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
}  # fmt: skip


def benchmark(chat: Turns = Turns.all, talks: list = TALKS, **changes) -> Benchmark:
    examples = [example_of(conversation(talk)) for talk in talks]
    return replace(
        Benchmark("made_up", [Task("a", examples, examples, examples)], "{text}", 300, 60, chat=chat), **changes
    )


def make_objective(shape: str = "llama", chat: Turns = Turns.all, template: str = "chatml", **changes) -> TextToText:
    gemma2 = {**SHAPES["qwen3"][1], "model_type": "gemma2", "final_logit_softcapping": 5.0}
    targets, config = SHAPES.get(shape, (["q_proj"], gemma2))
    backbone = Backbone(name=shape, architecture=Architecture.decoder, targets=targets, random_weights=True,
                        config={"vocab_size": 600, "pad_token_id": 2, **config}, chat_template=template)  # fmt: skip
    model, _ = backbone.load(torch.float32, torch.device("cpu"), 0, generates=True)
    with torch.no_grad():  # with the usual random weights every answer repeats one token
        for parameter in model.parameters():
            parameter.mul_(4)
    adapters = Adapters(model, backbone, Lora(name="lora", r=2), generates=True)
    adapters.add("default", 0)
    options = EvaluationOptions(max_new_tokens=12, **changes)
    hardware = Hardware(device=Device.cpu, dtype=Dtype.fp32)
    return TextToText("text_to_text").setup(benchmark(chat), backbone, adapters, tokenizer(), 0, hardware, options)


def expected_terms(objective: TextToText, talk: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, targets) of all marked tokens of one conversation, without padding or position ids."""
    out = tokenizer().apply_chat_template(talk, chat_template=objective.tokenizer.chat_template, return_dict=True,
                                          return_assistant_tokens_mask=True)  # fmt: skip
    ids, mask = torch.tensor(out["input_ids"]), torch.tensor(out["assistant_masks"])[1:].bool()
    return objective.adapters.model(input_ids=ids[None]).logits[0, :-1][mask], ids[1:][mask]


@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_in_rows_without_padding_have_the_same_logits(shape: str) -> None:
    objective = make_objective(shape)
    batch = objective.encode().train.batch(np.arange(8)[::-1])
    padded = objective.logits(batch)
    objective.padding_free = True
    assert torch.allclose(objective.logits(batch), padded, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, "gemma2"])
def test_loss_is_the_mean_over_the_tokens_of_all_answers(shape: str) -> None:
    objective = make_objective(shape)
    pool = objective.encode().train
    terms = [expected_terms(objective, talk) for talk in TALKS]
    logits, targets = (torch.cat(parts) for parts in zip(*terms, strict=True))
    batch = pool.batch(range(len(pool)))
    assert batch.padded
    assert objective.targets(batch).tolist() == targets.tolist()
    torch.testing.assert_close(objective.logits(batch), logits, rtol=1e-4, atol=1e-4)
    assert objective.loss(batch).item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert pool.weights.tolist() == [len(targets) for _, targets in terms]


def test_loss_on_the_last_answer_alone() -> None:
    objective, everything = make_objective(chat=Turns.last), make_objective()
    pool, full = objective.encode().train, everything.encode().train
    for row, talk in enumerate(TALKS):
        logits, targets = expected_terms(objective, talk)
        count = len(pool.answer[row])
        expected = F.cross_entropy(logits[-count:], targets[-count:]).item()
        assert objective.loss(pool.batch([row])).item() == pytest.approx(expected, rel=1e-5)
        assert pool.tokens(row).tolist() == full.tokens(row).tolist()
    assert pool.weights.sum() < full.weights.sum()
    assert pool.fingerprint != full.fingerprint


def test_parts_of_a_batch_have_its_terms() -> None:
    objective = make_objective()
    pool = objective.encode().train
    batch = pool.batch(range(len(pool)))
    total = sum(
        objective.loss(batch.select(torch.tensor(rows))) * float(pool.weights[rows].sum() / pool.weights.sum())
        for rows in ([0, 3, 5], [1, 2, 4, 6, 7])
    )
    assert total.item() == pytest.approx(objective.loss(batch).item(), rel=1e-5)


def test_a_prompt_of_vectors_in_front_moves_no_target() -> None:
    objective = make_objective()
    batch = objective.encode().train.batch(range(4))
    vectors = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    objective.prompt = lambda batch: vectors.expand(len(batch), -1, -1)
    together = objective.loss(batch)
    alone = torch.cat([objective.logits(batch.select(torch.tensor([row]))) for row in range(4)])
    assert F.cross_entropy(alone, objective.targets(batch)).item() == pytest.approx(together.item(), rel=1e-5)


@pytest.mark.parametrize(
    "shape", ["llama", *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("gpt2", "qwen3"))]
)
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch_and_stop_at_any_end(shape: str) -> None:
    objective = make_objective(shape)
    pool = objective.encode().test
    batch = pool.batch(range(len(pool)))
    free = objective.predict(batch, AnswerSpace([])).texts
    assert len(set(free)) > 2
    sampled = objective.adapters.model.generate(
        input_ids=batch.input_ids[:1], attention_mask=batch.attention_mask[:1], max_new_tokens=12, do_sample=False,
        eos_token_id=objective.ends, pad_token_id=2,
    )[0, batch.input_ids.shape[1] :].tolist()  # fmt: skip
    objective.ends = [*objective.ends, sampled[3]]
    answers = objective.predict(batch, AnswerSpace([])).texts
    assert answers[0] == tokenizer().decode(sampled[: sampled.index(sampled[3])], skip_special_tokens=True).strip()
    for size in (1, 3):
        rows = [range(start, min(start + size, len(pool))) for start in range(0, len(pool), size)]
        assert [text for part in rows for text in objective.predict(pool.batch(part), AnswerSpace([])).texts] == answers


def test_answers_also_end_with_the_tokens_of_the_models_generation_settings() -> None:
    objective = make_objective()
    end, own = objective.ends
    assert tokenizer().convert_ids_to_tokens([end, own]) == ["<|im_end|>", "</s>"]
    objective.adapters.model.generation_config.eos_token_id = [own, 9]
    objective.backbone = replace(objective.backbone, random_weights=False, path=".")
    objective.finish_setup()
    assert objective.ends == [end, own, 9]


def test_labels_are_ranked_as_answers_of_the_template() -> None:
    objective = make_objective(decode=Decode.rank)
    examples = [Example(f"which {word}", word) for word in ("gold", "iron")] * 3
    task = Task("a", examples, examples, examples, ("gold", "iron"))
    objective.benchmark = replace(objective.benchmark, tasks=[task])
    objective.finish_setup()
    pool = objective.encode_split(examples[:2], [0, 1], [0, 0])
    assert [objective.label_tokens[row].tolist() for row in (0, 1)] == [pool.answer[row].tolist() for row in (0, 1)]
    with torch.no_grad():
        scores = objective.rank(pool.batch([0, 1]), [0, 1])
        for row, word in enumerate(("gold", "iron")):
            talk = [{"role": "user", "content": f"which {word}"}, {"role": "assistant", "content": word}]
            logits, targets = expected_terms(objective, talk)
            likelihood = -F.cross_entropy(logits, targets, reduction="sum")
            torch.testing.assert_close(scores[row, row], likelihood, rtol=1e-4, atol=1e-4)


# What is cut

SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [SYSTEM, *({"role": role, "content": f"{role} {n} x"} for n in range(6) for role in ("user", "assistant"))]


def encoded(talk: list, max_length: int, **changes) -> SimpleNamespace:
    template = ChatTemplate(
        tokenizer(), Backbone("m", path=".", architecture=Architecture.decoder, chat_template="chatml")
    )
    result = ChatEncoder(template, benchmark(talks=[talk], max_length=max_length, **changes)).encode(
        [example_of(conversation(talk), "chat.jsonl, row 7")]
    )
    ids = result.prompts.rows[0]
    return SimpleNamespace(text=tokenizer().decode(ids), count=len(ids), full=result.prompts.lengths[0], answer=result.answers,
                           trained=result.trained and result.trained[0], ids=ids)  # fmt: skip


def test_the_oldest_exchanges_are_cut_first() -> None:
    full = encoded(LONG, 1000)
    assert full.count == full.full
    cut = encoded(LONG, full.full - 1)
    assert "user 0" not in cut.text
    assert cut.text == full.text.replace(
        "<|im_start|>user\nuser 0 x<|im_end|>\n<|im_start|>assistant\nassistant 0 x<|im_end|>\n", ""
    )
    assert cut.full == full.full
    shortest = encoded(LONG, 60)
    assert shortest.count <= 60
    assert shortest.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert shortest.text.endswith("user 5 x<|im_end|>\n<|im_start|>assistant\n")
    answered = [token for token, mark in zip(cut.ids, cut.trained, strict=True) if mark]
    assert tokenizer().decode(answered) == "".join(f"assistant {n} x<|im_end|>" for n in range(1, 5))


@pytest.mark.parametrize("side", list(Truncate))
def test_then_the_text_of_the_last_user_turn_is_cut(side: Truncate) -> None:
    talk = [
        *LONG[:3],
        {"role": "user", "content": " ".join(f"w{n}" for n in range(90))},
        {"role": "assistant", "content": "b"},
    ]
    cut = encoded(talk, 90, truncate=side)
    assert 85 < cut.count <= 90
    assert cut.full > 200
    assert ("w0 " in cut.text, "w89<" in cut.text) == {
        "end": (True, False),
        "start": (False, True),
        "middle": (True, True),
    }[side.value]
    assert cut.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_conversation_whose_rest_does_not_fit_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"chat.jsonl, row 7: benchmark.max_length=20 leaves no room for the last user turn"
    ):
        encoded(LONG, 20)


def test_conversations_that_the_template_refuses_are_named_together() -> None:
    template = ChatTemplate(
        tokenizer(), Backbone("m", path=".", architecture=Architecture.decoder, chat_template="mistral")
    )
    twice = conversation([LONG[1], LONG[1], LONG[2]])
    examples = [
        example_of(conversation(LONG[1:3])),
        *(example_of(twice, f"chat.jsonl, row {row}") for row in range(2, 7)),
    ]
    refused = "the chat template mistral refuses the conversation: after an optional system message, user and assistant must alternate"
    with pytest.raises(DataError) as error:
        ChatEncoder(template, benchmark()).encode(examples)
    assert str(error.value) == "; ".join(f"chat.jsonl, row {row}: {refused}" for row in (2, 3, 4)) + "; and 2 more"


def test_a_long_answer_ends_with_its_end_token() -> None:
    cut = encoded([*LONG[1:2], {"role": "assistant", "content": "x y z " * 40}], 100, max_target=9)
    assert len(cut.answer.rows[0]) == 9
    assert cut.answer.lengths[0] > 40
    assert tokenizer().decode(cut.answer.rows[0]).endswith("<|im_end|>")


def test_excerpt_takes_every_character_once() -> None:
    assert excerpt("abcdef", [(0, 2), (1, 3), (4, 6)]) == "abcef"


def test_the_prompt_of_other_benchmarks_is_the_users_turn() -> None:
    """Its columns are filled, and only the text is cut, with its protected spans last."""
    template = ChatTemplate(
        tokenizer(), Backbone("m", path=".", architecture=Architecture.decoder, chat_template="chatml")
    )
    text = " ".join(f"w{n}" for n in range(60)) + " KEEP"
    example = Example(text, "yes", {"hint": "short"}, protected_spans=((len(text) - 4, len(text)),))
    result = ChatEncoder(template, benchmark(max_length=60, template="{hint}: {text} ?")).encode([example])
    prompt = tokenizer().decode(result.prompts.rows[0])
    assert prompt.startswith("<|im_start|>user\nshort: w0 w1 ")
    assert prompt.endswith("KEEP ?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer().decode(result.answers.rows[0]) == "yes<|im_end|>"
    assert result.references == [("yes",)]
    assert np.array(result.trained[0]).sum() == 0
