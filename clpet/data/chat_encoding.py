"""Conversations as rows of tokens: the prompt of the last answer, cut to its maximum length, and the answer."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from clpet.data.benchmark import Benchmark, Example, Turns
from clpet.data.chat_template import ChatTemplate
from clpet.data.conversation import Conversation, conversation_of, with_last_user, without_oldest
from clpet.data.template import Tokenised, tokens_to_keep
from clpet.errors import DataError
from clpet.escape import short_repr

FEW = 3  # conversations in a message


class EncodedChats(NamedTuple):
    """Prompts and answers; `trained` has 1 for each token of a prompt that is in the loss, None if none is.

    `references` are the correct answers as texts.
    """

    prompts: Tokenised
    answers: Tokenised
    trained: list[list[int]] | None
    references: list[tuple[str, ...]]


class ChatEncoder:
    """Encodes the examples of a benchmark as conversations of a chat template.

    A prompt of more than `max_length` tokens loses its oldest exchanges first. System messages, the last user turn and
    what follows it are never dropped; if they are still too long, the text of the last user turn is cut as
    `benchmark.truncate` gives.
    """

    def __init__(self, template: ChatTemplate, benchmark: Benchmark) -> None:
        self.template, self.benchmark = template, benchmark
        self.before, self.after = benchmark.template.split("{text}")

    def encode(self, examples: Sequence[Example]) -> EncodedChats:
        """Raises DataError, with the files and rows of the conversations that the template does not write."""
        prompts, answers = Tokenised([], []), Tokenised([], [])
        trained: list[list[int]] = []
        references: list[tuple[str, ...]] = []
        problems: list[str] = []
        for example in examples:
            try:
                ids, marks, length, answer = self._encode(example)
            except DataError as error:
                problems.append(f"{example.origin or f'the example {short_repr(example.text)}'}: {error}")
                continue
            prompts.rows.append(ids)
            prompts.lengths.append(length)
            trained.append([0, *marks[1:]])  # nothing precedes the first token that could predict it
            answers.rows.append(shortened(answer, self.benchmark.max_target))
            answers.lengths.append(len(answer))
            references.append(example.references or (self._reference(example, answer),))
        if problems:
            more = f"; and {len(problems) - FEW} more" if len(problems) > FEW else ""
            raise DataError("; ".join(problems[:FEW]) + more)
        return EncodedChats(prompts, answers, trained if self.benchmark.chat is Turns.all else None, references)

    def _encode(self, example: Example) -> tuple[list[int], list[int], int, list[int]]:
        """(prompt, marks of the assistant's turns in it, its length before the cut, answer). Raises DataError."""
        talk = conversation_of(example, self._user_turn(example, example.text))
        if "messages" in example.fields:
            self.template.check_complete(talk)
        talk, ids, marks, length = self._fitted(example, talk)
        return ids, marks, length, self.template.answer(talk, ids) if talk.answer else [self.template.ends[0]]

    def answers(self, texts: Sequence[str], max_tokens: int) -> Tokenised:
        """Token ids of answers to a short message, each with the end token and at most `max_tokens` long."""
        prompt, _ = self.template.tokens([{"role": "user", "content": "a"}], prompt=True, mark=False)
        talks = [conversation_of(Example("a", text), "a") for text in texts]
        rows = [self.template.answer(talk, prompt) for talk in talks]
        return Tokenised([shortened(ids, max_tokens) for ids in rows], [len(ids) for ids in rows])

    def _reference(self, example: Example, answer: list[int]) -> str:
        """The answer as a text: calls of tools as the template writes them."""
        if "answer" not in example.fields:
            return str(example.target)
        return self.template.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _user_turn(self, example: Example, text: str) -> str:
        """The content of the last user turn with another text: the prompt of the benchmark, filled."""
        if "messages" in example.fields:
            return text
        fill = dict(example.fields)
        before, after = (
            re.sub(r"\{(\w+)\}", lambda slot: fill.get(slot.group(1), slot.group(0)), side)
            for side in (self.before, self.after)
        )
        return before + text + after

    def _fitted(self, example: Example, talk: Conversation) -> tuple[Conversation, list[int], list[int], int]:
        """(conversation whose prompt fits, its token ids and marks, number of tokens before the cut)."""
        limit = self.benchmark.max_length
        ids, marks = self._tokens(talk)
        length = len(ids)
        while len(ids) > limit and (shorter := without_oldest(talk.messages)) is not None:
            talk = talk._replace(messages=shorter)
            ids, marks = self._tokens(talk)
        if len(ids) <= limit:
            return talk, ids, marks, length
        encoded = self.template.tokenizer(
            example.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        room = len(offsets)
        while len(ids) > limit:
            room -= len(ids) - limit
            if room < 1:
                raise DataError(
                    f"benchmark.max_length={limit} leaves no room for the last user turn: raise it, or remove the row"
                )
            spans = example.protected_spans
            rows = tokens_to_keep(offsets, example.entity_spans, room, spans, self.benchmark.truncate)
            content = self._user_turn(example, excerpt(example.text, [offsets[row] for row in rows]))
            talk = talk._replace(messages=with_last_user(talk.messages, content))
            ids, marks = self._tokens(talk)
        return talk, ids, marks, length

    def _tokens(self, talk: Conversation) -> tuple[list[int], list[int]]:
        return self.template.tokens(talk.messages, talk.tools, prompt=True, mark=self.benchmark.chat is Turns.all)


def shortened(ids: list[int], max_tokens: int) -> list[int]:
    """An answer of at most `max_tokens` tokens, the last of which is its end token."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The characters of a text in ascending spans, each once."""
    pieces, reached = [], 0
    for start, end in spans:
        pieces.append(text[max(start, reached) : end])
        reached = max(reached, end)
    return "".join(pieces)
