"""Chat templates: conversations as text and tokens, and which of these tokens the assistant's turns consist of.

A template is the tokenizer's own, one of `chat_templates/`, or a file. A template with {% generation %} blocks marks
the assistant's turns itself: the marked tokens are those of `apply_chat_template(return_assistant_tokens_mask=True)`.
In another one, a turn is what the template adds to the messages before it with their generation prompt.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from clpet.config.identity import digest
from clpet.data.conversation import Conversation, Message
from clpet.errors import ConfigError, DataError, first_line, suggest
from clpet.records import Json

if TYPE_CHECKING:  # `clpet report` reads data and must not wait for torch
    from clpet.models.backbone import Backbone
    from clpet.models.protocols import Tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
EXCHANGE = Conversation([{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"})
ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)  # what a template may raise on messages

Marked = tuple[list[int], list[int]]  # token ids, and for each 1 if it belongs to a turn of the assistant, else 0


def template_text(backbone: "Backbone") -> str | None:
    """The template that `model.chat_template` names; None for the tokenizer's own. Raises ConfigError."""
    name = backbone.chat_template
    if name is None:
        return None
    shipped = {path.stem: path for path in FOLDER.glob("*.jinja")}
    path = shipped.get(name, Path(name).expanduser())
    if not path.is_file():
        hint = suggest(name, shipped)
        raise ConfigError(f"model.chat_template={name} is neither a file nor a template of clpet{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template={name} cannot be read: {first_line(error)}") from error


def file_fingerprint(backbone: "Backbone") -> str | None:
    """Hash of the file that `model.chat_template` names; None for a template of clpet or of the tokenizer."""
    name, text = backbone.chat_template, template_text(backbone)
    return None if text is None or (FOLDER / f"{name}.jinja").is_file() else digest(text, 32)


class ChatTemplate:
    """The chat template of a model with its tokenizer; `ends` are the ids of the tokens that end an answer.

    Raises ConfigError if there is no template, or one that cannot be trained on.
    """

    def __init__(self, tokenizer: "Tokenizer", backbone: "Backbone") -> None:
        self.tokenizer, self.options = tokenizer, backbone.chat_options
        self.name = f"the chat template {backbone.chat_template or 'of ' + backbone.name}"
        text = template_text(backbone)
        if text is None and not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of model {backbone.name} has no chat template: set model.chat_template=plain (a line "
                "per turn), another template of clpet, or a file"
            )
        self.text = text or tokenizer.get_chat_template()
        self.marked = bool(MARK.search(self.text))
        self.ends: list[int] = []
        self.ends = list(dict.fromkeys([self._end_of_turn(), *self._other_ends(backbone)]))

    def render(self, messages: Sequence[Message], tools: Sequence[Json] | None = None, prompt: bool = False) -> str:
        """The messages as text, with `prompt` followed by the generation prompt. Raises DataError if refused."""
        return cast(str, self._apply(messages, tools, prompt, tokenize=False))

    def tokens(
        self, messages: Sequence[Message], tools: Sequence[Json] | None = None, prompt: bool = False, mark: bool = True
    ) -> Marked:
        """The messages as tokens, with `mark` those of the assistant's turns marked. Raises DataError."""
        if mark and self.marked:
            options = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
            marked = cast(Mapping[str, list[int]], self._apply(messages, tools, prompt, **options))
            return marked["input_ids"], marked["assistant_masks"]
        text = self.render(messages, tools, prompt)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, marks = out["input_ids"], [0] * len(out["input_ids"])
        for start, end in self._turns(messages, tools, text) if mark else ():
            turn = [row for row, (a, b) in enumerate(out["offset_mapping"]) if b > start and a < end]
            for row in turn[: len(self.until_end([ids[row] for row in turn]))]:
                marks[row] = 1
        return ids, marks

    def answer(self, talk: Conversation, prompt: Sequence[int]) -> list[int]:
        """The tokens of the answer of a conversation, whose messages are the tokens `prompt`, up to its end token.

        As a rule they are what the tokens of the whole conversation add to those of the prompt. Where the first
        characters of an answer would become one token with the end of the prompt, the answer is tokenised by itself:
        the model sees in training what it sees when it answers. Raises DataError.
        """
        assert talk.answer is not None
        messages = [*talk.messages, talk.answer]
        ids, _ = self.tokens(messages, talk.tools, mark=False)
        if ids[: len(prompt)] == list(prompt):
            return self.until_end(ids[len(prompt) :])
        text, question = self.render(messages, talk.tools), self.render(talk.messages, talk.tools, prompt=True)
        if not text.startswith(question):
            raise DataError(
                f"{self.name} does not begin an answer with its generation prompt: {question[-40:]!r} is not in the "
                "conversation with the answer"
            )
        rest = text[len(question) :]
        return self.until_end(self.tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])

    def until_end(self, ids: list[int]) -> list[int]:
        """The tokens up to the last of `ends`: what a template puts between two turns belongs to neither."""
        last = max((row for row, token in enumerate(ids) if token in self.ends), default=len(ids) - 1)
        return ids[: last + 1]

    def check_complete(self, talk: Conversation) -> None:
        """Raises DataError if the template leaves something out: a message, a tool, or a call of one."""
        messages = [*talk.messages, *([talk.answer] if talk.answer else [])]
        prompt = talk.answer is None
        text = self.render(messages, talk.tools, prompt)
        if talk.tools and self.render(messages, None, prompt) == text:
            raise DataError(f"{self.name} leaves out the tools")
        for number, message in enumerate(messages):
            content = str(message["content"])
            changes: dict[str, Message] = {}
            if content.strip() not in text:
                changes[f"the content of message {number + 1} ({message['role']})"] = {"content": f"{content}x"}
            if message.get("tool_calls"):
                changes[f"the tool calls of message {number + 1}"] = {"tool_calls": None}
            for what, change in changes.items():
                other = [*messages[:number], {**message, **change}, *messages[number + 1 :]]
                if self.render(other, talk.tools, prompt) == text:
                    raise DataError(f"{self.name} leaves out {what}")

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Json] | None, prompt: bool, **options: object
    ) -> object:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=prompt,
                **options,
                **self.options,
            )
        except ERRORS as error:
            raise DataError(f"{self.name} refuses the conversation: {first_line(error)[:200]}") from error

    def _turns(self, messages: Sequence[Message], tools: Sequence[Json] | None, text: str) -> list[tuple[int, int]]:
        """The span in `text` of every turn of the assistant. Raises DataError where earlier turns are not a prefix."""
        spans = []
        for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
            before = self.render(messages[:index], tools, prompt=True) if index else ""
            through = self.render(messages[: index + 1], tools)
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"{self.name} writes an earlier turn differently when another one follows, and has no "
                    "{% generation %} blocks: set benchmark.chat=last, or a model.chat_template that has them"
                )
            spans.append((len(before), len(through)))
        return spans

    def _end_of_turn(self) -> int:
        """The special token at the end of an answer. Raises ConfigError."""
        try:
            prompt, _ = self.tokens(EXCHANGE.messages, prompt=True, mark=False)
            answer = self.answer(EXCHANGE, prompt)
            ids, marks = self.tokens([*EXCHANGE.messages, cast(Message, EXCHANGE.answer)])
        except DataError as error:
            raise ConfigError(str(error)) from error
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ends = [row for row, token in enumerate(answer) if token in special]
        if not ends:
            raise ConfigError(
                f"{self.name} ends an answer with {self.tokenizer.decode(answer)!r}, whose last token is not a special "
                "token of this model, so that generation could not stop: set model.chat_template=plain, for example"
            )
        turn = [token for token, mark in zip(ids, marks, strict=True) if mark]
        if self.marked and turn != answer[: ends[-1] + 1]:
            raise ConfigError(
                f"{self.name} has a {{% generation %}} block that does not begin after its generation prompt, or "
                "does not end with its end token"
            )
        return answer[ends[-1]]

    def _other_ends(self, backbone: "Backbone") -> list[int]:
        """The tokenizer's end token and those of `model.end_tokens`. Raises ConfigError for an unknown one."""
        vocabulary = self.tokenizer.get_vocab()
        for name in backbone.end_tokens:
            if name not in vocabulary:
                raise ConfigError(f"model.end_tokens names {name}, which is not a token of model {backbone.name}")
        end = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        return [*([] if end is None else [end]), *(vocabulary[name] for name in backbone.end_tokens)]
