"""Conversations: checked messages, and the examples that carry them.

The example of a conversation has the content of its last user turn as text and that of its last turn, the answer, as
target. Its fields hold JSON: `messages` before the answer, `answer` if that is more than a text, and `tools`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from clpet.data.benchmark import Example
from clpet.errors import DataError
from clpet.escape import short_repr
from clpet.records import Json

Message = Mapping[str, Json]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"from", "value"}  # the keys of another common form


class Conversation(NamedTuple):
    """The messages before an answer, the answer (None: to be predicted), and JSON schemas of tools."""

    messages: list[Message]
    answer: Message | None = None
    tools: list[Json] | None = None


def conversation(messages: object, tools: object = None) -> Conversation:
    """The checked conversation of a row, whose values may be JSON texts; its last assistant turn must end it.

    Raises DataError with a noun phrase, as `ReadReport.add_bad_row` needs it.
    """
    turns = checked(messages)
    if all(turn["role"] != "assistant" for turn in turns):
        raise DataError("a conversation without an assistant turn")
    if turns[-1]["role"] != "assistant":
        raise DataError(f"a conversation that ends with a {turns[-1]['role']} turn instead of an answer")
    return Conversation(_with_user(turns[:-1]), turns[-1], checked_tools(tools))


def question(messages: object, tools: object = None) -> Conversation:
    """A checked conversation whose next turn is to be predicted. Raises DataError with a noun phrase."""
    turns = checked(messages)
    if turns[-1]["role"] == "assistant":
        raise DataError("a conversation that ends with an assistant turn, after which none is predicted")
    return Conversation(_with_user(turns), None, checked_tools(tools))


def _with_user(turns: list[Message]) -> list[Message]:
    if all(turn["role"] != "user" for turn in turns):
        raise DataError("a conversation without a user turn before its answer")
    return turns


def checked(messages: object) -> list[Message]:
    """The messages of a row, without their empty keys. Raises DataError with a noun phrase."""
    values = _parsed(messages, "messages")
    if not values:
        raise DataError("a conversation without messages")
    return [_checked(value, number) for number, value in enumerate(values, 1)]


def checked_tools(tools: object) -> list[Json] | None:
    """The tools of a row, None without any. Raises DataError with a noun phrase."""
    values = _parsed(tools, "tools") if tools else []
    if not all(isinstance(value, dict) for value in values):
        raise DataError("tools that are not a list of JSON schemas")
    return values or None


def _parsed(value: object, name: str) -> list[Json]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        except (ValueError, RecursionError):
            raise DataError(f"{name} that are not JSON") from None
    if not isinstance(value, list):
        raise DataError(f"{name} that are not a list")
    return value


def _checked(value: Json, number: int) -> Message:
    """One message. Tables that store messages as columns give every message all keys, with null for its absent ones."""
    if not isinstance(value, dict):
        raise DataError(f"a message {number} that is not an object with role and content")
    message = {key: item for key, item in value.items() if item is not None and item != []}
    if "role" not in message:
        hint = " (rename from and value to role and content)" if message.keys() >= SHAREGPT else ""
        raise DataError(f"a message {number} without a role{hint}")
    role, content = message["role"], message.get("content", "")
    if role not in ROLES:
        raise DataError(f"a message {number} with the role {short_repr(role)}, which is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"a message {number} ({role}) whose content is not a text")
    if not content.strip() and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"an empty content in message {number} ({role})")
    return message | {"content": content.replace("\r\n", "\n")}


def example_of(talk: Conversation, origin: str = "") -> Example:
    """The example of a conversation; `origin` is its file and row, for messages."""
    fields = {"messages": _dumped(talk.messages)}
    target = None
    if talk.answer is not None:
        target = str(talk.answer["content"])
        if talk.answer.keys() != {"role", "content"}:
            fields["answer"] = _dumped(talk.answer)
            target = target or _dumped(talk.answer["tool_calls"])
    if talk.tools:
        fields["tools"] = _dumped(talk.tools)
    text = next(str(turn["content"]) for turn in reversed(talk.messages) if turn["role"] == "user")
    return Example(text, target, fields, origin=origin)


def conversation_of(example: Example, prompt: str) -> Conversation:
    """The conversation of an example; one without messages is a user turn, the filled `prompt`, with its answer."""
    fields = example.fields
    answer = None if example.target is None else {"role": "assistant", "content": example.target}
    if "messages" not in fields:
        return Conversation([{"role": "user", "content": prompt}], cast(Message | None, answer))
    return Conversation(
        json.loads(fields["messages"]),
        json.loads(fields["answer"]) if "answer" in fields else answer,
        json.loads(fields["tools"]) if "tools" in fields else None,
    )


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without their oldest exchange; None if only system messages and the last user turn are left."""
    first = next(index for index, turn in enumerate(messages) if turn["role"] not in ("system", "developer"))
    later = [index for index, turn in enumerate(messages) if turn["role"] == "user" and index > first]
    if not later:
        return None
    rules = [turn for turn in messages[first : later[0]] if turn["role"] in ("system", "developer")]
    return [*messages[:first], *rules, *messages[later[0] :]]


def with_last_user(messages: Sequence[Message], content: str) -> list[Message]:
    """The messages with another content of the last user turn."""
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "user")
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
