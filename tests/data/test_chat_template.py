"""Chat templates: which tokens are the assistant's, where answers begin and end, and what a template leaves out."""

import json
from pathlib import Path

import pytest

from clpet.data.chat_template import FOLDER, MARK, ChatTemplate
from clpet.data.conversation import conversation
from clpet.errors import ConfigError, DataError
from clpet.models.backbone import Architecture, Backbone, byte_tokenizer
from tests.conversations import made_up, tokenizer

TEMPLATES = ("chatml", "llama3", "mistral")


def backbone(template: str | None = None, **options) -> Backbone:
    values = {
        "name": "made_up",
        "architecture": Architecture.decoder,
        "random_weights": True,
        "config": {"model_type": "llama"},
    }
    return Backbone(**values, chat_template=template, **options)


def unmarked(name: str, folder: Path) -> str:
    """The file of a shipped template without its {% generation %} blocks, as models publish theirs."""
    text = (FOLDER / f"{name}.jinja").read_text().replace("{%- endgeneration -%}", "")
    file = folder / f"{name}.jinja"
    file.write_text(MARK.sub("", text.replace("{%- generation -%}", "")))
    return str(file)


@pytest.mark.parametrize("name", [*TEMPLATES, "qwen3", "plain"])
def test_prompt_and_answer_are_the_conversation_with_the_marks_of_transformers(name: str) -> None:
    template = ChatTemplate(tokenizer(), backbone(name))
    for messages in made_up():
        talk = conversation(messages)
        prompt, marks = template.tokens(talk.messages, prompt=True)
        answer = template.answer(talk, prompt)
        expected = tokenizer().apply_chat_template(
            messages, chat_template=template.text, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        end = len(prompt) + len(answer)
        assert prompt + answer == ids[:end]
        assert marks + [1] * len(answer) == mask[:end]
        assert not any(mask[end:])
        assert answer[-1] == template.ends[0]


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_without_generation_blocks_a_turn_is_what_the_template_adds_to_its_prompt(name: str, tmp_path: Path) -> None:
    marked, other = (ChatTemplate(tokenizer(), backbone(path)) for path in (name, unmarked(name, tmp_path)))
    assert (marked.marked, other.marked) == (True, False)
    assert marked.ends == other.ends
    for messages in made_up(20):
        talk = conversation(messages)
        assert marked.tokens(talk.messages, prompt=True) == other.tokens(talk.messages, prompt=True)


def test_earlier_turns_that_change_are_refused_where_they_are_in_the_loss(tmp_path: Path) -> None:
    """Qwen3 writes an empty block of thoughts before the last answer only."""
    template = ChatTemplate(tokenizer(), backbone(unmarked("qwen3", tmp_path)))
    talk = conversation(made_up(1, seed=1)[0] + made_up(1, seed=2)[0][-2:])
    with pytest.raises(DataError, match=r"writes an earlier turn differently .* set benchmark.chat=last"):
        template.tokens(talk.messages, prompt=True)
    prompt, _ = template.tokens(talk.messages, prompt=True, mark=False)
    assert tokenizer().decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_tokens_of_the_plain_template_by_hand() -> None:
    """Bytes: [CLS] User: hi / Assistant: ho [SEP]."""
    reader = byte_tokenizer()
    template = ChatTemplate(reader, backbone("plain"))
    talk = conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    prompt, marks = template.tokens(talk.messages, prompt=True)
    assert prompt == [
        reader.convert_tokens_to_ids("[CLS]"),
        *reader("User: hi\nAssistant:", add_special_tokens=False)["input_ids"],
    ]
    assert sum(marks) == 0
    assert template.answer(talk, prompt) == [*reader(" ho", add_special_tokens=False)["input_ids"], reader.sep_token_id]
    assert template.ends == [reader.sep_token_id]


def test_an_answer_that_would_merge_with_its_prompt_is_tokenised_by_itself() -> None:
    """A line feed at its start would become one token with that of the header; generation could not write it."""
    template = ChatTemplate(tokenizer(), backbone("chatml"))
    talk = conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}])
    prompt, _ = template.tokens(talk.messages, prompt=True)
    answer = template.answer(talk, prompt)
    assert tokenizer().decode(prompt + answer) == template.render([*talk.messages, talk.answer]).rstrip()
    assert tokenizer().decode(answer) == "\n\nb<|im_end|>"


def test_answers_end_with_the_tokens_of_template_tokenizer_and_model() -> None:
    template = ChatTemplate(tokenizer(), backbone("chatml", end_tokens=["<|eot_id|>"]))
    assert tokenizer().convert_ids_to_tokens(template.ends) == ["<|im_end|>", "</s>", "<|eot_id|>"]
    with pytest.raises(ConfigError, match=r"model.end_tokens names <\|end\|>, which is not a token of model made_up"):
        ChatTemplate(tokenizer(), backbone("chatml", end_tokens=["<|end|>"]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatm", "is neither a file nor a template of clpet; did you mean chatml"),
        (None, "the tokenizer of model made_up has no chat template: set model.chat_template=plain"),
        ("{{ messages[0].content", "refuses the conversation"),
        ("{% for m in messages %}{{ m.content + '#' }}{% endfor %}", "'b#', whose last token is not a special token"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}",
            "does not begin after",
        ),
        (
            "{% if add_generation_prompt %}?{% endif %}{{ messages[-1].content }}</s>",
            "does not begin an answer with its",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on(template: str | None, message: str, tmp_path: Path) -> None:
    if template and "{" in template:
        (tmp_path / "own.jinja").write_text(template)
        template = str(tmp_path / "own.jinja")
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(tokenizer(), backbone(template))


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"town": "Cork"}}}
TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
WITH_CALL = [
    {"role": "user", "content": "When is high tide?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "at noon"},
    {"role": "assistant", "content": "At noon."},
]


def test_calls_of_tools_are_written_where_the_template_knows_them() -> None:
    qwen3 = ChatTemplate(tokenizer(), backbone("qwen3"))
    qwen3.check_complete(conversation(WITH_CALL))
    talk = conversation(WITH_CALL[:2])
    prompt, _ = qwen3.tokens(talk.messages, prompt=True)
    answer = '<tool_call>\n{"name": "tide", "arguments": {"town": "Cork"}}\n</tool_call><|im_end|>'
    assert tokenizer().decode(qwen3.answer(talk, prompt)) == answer
    with pytest.raises(DataError, match="qwen3 leaves out the tools"):
        qwen3.check_complete(conversation(WITH_CALL, TOOLS))


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("chatml", WITH_CALL, "chatml leaves out the tool calls of message 2"),
        ("mistral", WITH_CALL, "refuses the conversation: after an optional system message, user and assistant must"),
        ("mistral", [*WITH_CALL[:1], *WITH_CALL[:1], WITH_CALL[-1]], "user and assistant must alternate"),
    ],
)
def test_what_a_template_cannot_write_is_refused(name: str, messages: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(tokenizer(), backbone(name)).check_complete(conversation(messages))


def test_a_template_that_drops_the_system_message_is_refused(tmp_path: Path) -> None:
    text = "{% for m in messages if m.role != 'system' %}{{ m.content + '</s>' }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    template = ChatTemplate(tokenizer(), backbone(str(tmp_path / "own.jinja")))
    system = [{"role": "system", "content": "Be brief."}]
    template.check_complete(conversation(WITH_CALL[::3]))
    with pytest.raises(DataError, match=r"leaves out the content of message 1 \(system\)"):
        template.check_complete(conversation(system + WITH_CALL[::3]))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_on_the_tokens_of_trl(name: str, tmp_path: Path) -> None:
    """The data set that TRL's SFTTrainer prepares with assistant_only_loss=True, token for token."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    talks, template = made_up(50, seed=7), ChatTemplate(tokenizer(), backbone(name))
    config = LlamaConfig(vocab_size=600, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    reader = tokenizer()
    reader.chat_template = template.text
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=reader,
    )
    for messages, row in zip(talks, trainer.train_dataset, strict=True):
        talk = conversation(messages)
        prompt, marks = template.tokens(talk.messages, prompt=True)
        answer = template.answer(talk, prompt)
        labels = trainer.data_collator([row])["labels"][0].tolist()
        mine = [token if mark else -100 for token, mark in zip(prompt, marks, strict=True)] + answer
        assert labels == mine + [-100] * (len(labels) - len(mine))
        assert json.dumps(row["input_ids"][: len(mine)]) == json.dumps(prompt + answer)
    reader.chat_template = None
