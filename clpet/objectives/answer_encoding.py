"""Answers as tokens: with their end token, in the chat template or after a prompt of plain text."""

import sys
from collections.abc import Callable, Sequence

from torch import nn

from clpet.data.benchmark import Benchmark
from clpet.data.chat_encoding import ChatEncoder
from clpet.data.chat_template import ChatTemplate
from clpet.data.template import Tokenised
from clpet.errors import DataError
from clpet.models.backbone import Backbone
from clpet.models.protocols import Tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """Id of the token that ends an answer. Raises DataError for a tokenizer without one."""
    end = next((id for id in (tokenizer.eos_token_id, tokenizer.sep_token_id) if id is not None), None)
    if end is None:
        raise DataError("the tokenizer has no end token, so a text_to_text answer could not end")
    return end


def generation_ends(model: nn.Module) -> list[int]:
    """Ids of the end tokens that a model's own generation settings name."""
    ends: int | list[int] | None = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def encode_answers(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> Tokenised:
    """Token ids of answers, each with the end token and at most `max_tokens` long.

    In a byte-level vocabulary the space between prompt and answer is part of the answer's first token.
    """
    if not texts:
        return Tokenised([], [])
    spaced = len(tokenizer(" a", add_special_tokens=False)["input_ids"]) == 1
    lead = " " if spaced and len(tokenizer("a", add_special_tokens=False)["input_ids"]) == 1 else ""
    rows = tokenizer([lead + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    end = end_token(tokenizer)
    return Tokenised([[*ids[: max_tokens - 1], end] for ids in rows], [len(ids) + 1 for ids in rows])


def chat_encoder(benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> ChatEncoder | None:
    """The encoder of a benchmark in the chat form, None for another benchmark. Raises ConfigError."""
    return ChatEncoder(ChatTemplate(tokenizer, backbone), benchmark) if benchmark.chat else None


def check_cut_labels(encode: Callable[[list[str], int], Tokenised], benchmark: Benchmark) -> None:
    """Raises DataError if two labels of a task become the same tokens under an encoder of answers."""
    for task in benchmark.tasks:
        full = encode(list(task.labels), sys.maxsize).rows
        indices: dict[tuple[int, ...], int] = {}
        for index, ids in enumerate(full):
            other = indices.setdefault((*ids[:-1][: benchmark.max_target - 1],), index)
            if other == index:
                continue
            names = f"task {task.name}: the labels {task.labels[other]!r} and {task.labels[index]!r} are"
            if ids == full[other]:
                raise DataError(f"{names} the same tokens in this model's vocabulary: rename one of them")
            raise DataError(
                f"{names} equal in the first benchmark.max_target={benchmark.max_target} tokens, including the end: "
                f"the longest label of the task needs benchmark.max_target={max(map(len, full))}"
            )


def until(rows: list[list[int]], ends: Sequence[int]) -> list[list[int]]:
    """Each row up to the first of its `ends`, without it."""
    return [row[: next((index for index, token in enumerate(row) if token in ends), len(row))] for row in rows]


def through(rows: list[list[int]], ends: Sequence[int]) -> list[list[int]]:
    """Each row up to the first of its `ends`, with it."""
    return [row[: len(answer) + 1] for row, answer in zip(rows, until(rows, ends), strict=True)]
