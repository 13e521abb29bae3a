"""Prompts that show the correct answer to their question, for a teacher that reads more than the student."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clpet.data.batches import EncodedDataset, pad_id
from clpet.data.benchmark import Benchmark, Example
from clpet.data.chat_encoding import ChatEncoder
from clpet.data.chat_template import ChatTemplate
from clpet.data.conversation import with_last_user
from clpet.data.template import Template, Tokenised
from clpet.errors import ConfigError, DataError
from clpet.objectives.answer_encoding import chat_encoder
from clpet.objectives.base import longest_input
from clpet.objectives.text_to_text import TextToText

log = logging.getLogger(__name__)

PROMPT, ANSWER = "{prompt}", "{answer}"
SLOT = "demonstration_"  # of the answer; {answer} may also be a slot of the benchmark's own template


class DemonstratingChat(ChatEncoder):
    """Puts the last user turn of a conversation into `around`, together with the answer."""

    def __init__(self, template: ChatTemplate, benchmark: Benchmark, around: str) -> None:
        super().__init__(template, benchmark)
        self.around = around

    def _user_turn(self, example: Example, text: str) -> str:
        before, after = self.around.replace(ANSWER, example.fields[SLOT]).split(PROMPT)
        return before + super()._user_turn(example, text) + after

    def prompts(self, examples: Sequence[Example]) -> Tokenised:
        """Token ids of the prompts."""
        return self.encode([self._with_turn(example) for example in examples]).prompts

    def _with_turn(self, example: Example) -> Example:
        """An example whose messages, if it has any, contain the turn that `_user_turn` returns."""
        if "messages" not in example.fields:
            return example
        messages = with_last_user(json.loads(example.fields["messages"]), self._user_turn(example, example.text))
        return replace(example, fields={**example.fields, "messages": json.dumps(messages, ensure_ascii=False)})


def demonstrating_prompts(objective: TextToText, pool: EncodedDataset, template: str) -> EncodedDataset:
    """The training prompts in `template`, whose {answer} is the answer of the same row of `pool`.

    Where a prompt is too long for the model its text is cut, and neither the template nor the answer. Raises
    ConfigError if they leave no room for a text.
    """
    benchmark, tokenizer = objective.benchmark, objective.tokenizer
    examples = [example for task in benchmark.tasks for example in task.train]
    answers = shown_answers(objective, pool, examples)
    shown = [
        replace(example, fields={**example.fields, SLOT: answer})
        for example, answer in zip(examples, answers, strict=True)
    ]
    around = tokenizer(template.replace(PROMPT, "").replace(ANSWER, ""), add_special_tokens=False)["input_ids"]
    limit = benchmark.max_length + len(around) + template.count(ANSWER) * benchmark.max_target
    longest = longest_input(objective.adapters)
    if longest is not None:
        limit = min(limit, longest - (benchmark.max_target if objective.causal else 0))
    try:
        prompts = _encode(objective, shown, template, limit)
    except DataError as error:
        raise ConfigError(
            f"method.template and the answer do not fit into a prompt of {limit} tokens: shorten the template, or "
            f"lower benchmark.max_target ({error})"
        ) from error
    cut = np.array([length > limit for length in prompts.lengths], dtype=bool)
    if further := int((cut & (pool.full_lengths <= pool.source.lengths)).sum()):
        log.warning("the text of %d of %d prompts is cut to make room for the answer", further, len(pool))
    labels = [-1] * len(pool)
    return EncodedDataset(prompts.rows, labels, pool.tasks.tolist(), pad_id(tokenizer), left=pool.left)


def shown_answers(objective: TextToText, pool: EncodedDataset, examples: Sequence[Example]) -> list[str]:
    """The answer of every row; one that is cut in training is cut here as well."""
    assert pool.answer is not None
    cut = pool.full_answer_lengths > pool.answer.lengths
    return [
        objective.tokenizer.decode(pool.answer[row], skip_special_tokens=True).strip() if cut[row] else str(e.target)
        for row, e in enumerate(examples)
    ]


def _encode(objective: TextToText, examples: Sequence[Example], template: str, limit: int) -> Tokenised:
    benchmark, tokenizer = replace(objective.benchmark, max_length=limit), objective.tokenizer
    if chat := chat_encoder(benchmark, objective.backbone, tokenizer):
        return DemonstratingChat(chat.template, benchmark, template).prompts(examples)
    filled = template.replace(ANSWER, f"{{{SLOT}}}").replace(PROMPT, benchmark.template)
    return Template(tokenizer, filled, limit, end=not objective.causal, truncate=benchmark.truncate).encode(examples)
