"""Greedy and sampled answers: in padded batches, or greedy ones with continuous batching on a GPU.

In a padded batch every row takes as many steps as the longest answer. Continuous batching (`generate_batch` of
transformers) computes prompts and answers without padding, and a row that has ended makes room for another one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from clpet.data.batches import Batch
from clpet.errors import HostError
from clpet.models.protocols import Network
from clpet.runtime.distributed import get_world

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig

PAGE = 256  # tokens of a page of the key-value cache, as in transformers


class Answer(Protocol):
    """The part of transformers' GenerationOutput that is read here."""

    generated_tokens: list[int]
    error: str | None


class Generator(Protocol):
    """The part of a network of transformers that is used here."""

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: "GenerationConfig",
        continuous_batching_config: "ContinuousBatchingConfig",
        warmup: bool,
    ) -> dict[str, Answer]: ...


def greedy(new_tokens: int, ends: Sequence[int], pad: int, start: int | None) -> "GenerationConfig":
    """Settings of greedy decoding of at most `new_tokens` tokens, which override those of the model."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=list(ends), pad_token_id=pad,
        decoder_start_token_id=start, repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
    )  # fmt: skip


class InverseTransform:
    """Turns the logits of a step into a choice of one token per row, for greedy decoding of a random answer.

    `uniform` [rows, tokens] in [0, 1) decides: the token is the first whose cumulated probability exceeds it. An answer
    thus depends on its own numbers alone, and not on the other rows of its batch. With `top_k` only that many most
    likely tokens can be drawn.
    """

    def __init__(self, uniform: Tensor, temperature: float, top_k: int | None = None) -> None:
        self.uniform, self.temperature, self.top_k, self.step = uniform, temperature, top_k, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, vocabulary]: 0 for the drawn token, minus infinity for all others."""
        if self.top_k is not None and self.top_k < scores.shape[1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], float("-inf"))
        cumulated = (scores.double() / self.temperature).softmax(1).cumsum(1)
        thresholds = self.uniform[:, self.step, None] * cumulated[:, -1:]
        token = (cumulated <= thresholds).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def padded_answers(
    model: Network,
    inputs: Mapping[str, Tensor],
    settings: "GenerationConfig",
    causal: bool,
    draw: InverseTransform | None = None,
) -> list[list[int]]:
    """The answer tokens of every row of a batch, padded behind the end token, with a key-value cache.

    With `draw` the tokens are drawn. The ranks of a sharded network then have different batches, and take equally many
    steps.
    """
    if draw is None:
        output = model.generate(generation_config=settings, **inputs)
    else:
        from transformers import LogitsProcessorList

        processors = LogitsProcessorList([draw])
        sharded = get_world().sharded
        output = model.generate(generation_config=settings, logits_processor=processors, synced_gpus=sharded, **inputs)
    # A decoder's output begins with the prompt, unless that was given as embeddings; others' with the start token.
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    answers: list[list[int]] = output[:, prompt if causal else 1 :].tolist()
    return answers


def without_padding(batch: Batch) -> list[list[int]]:
    """The token ids of every row."""
    rows = zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def continuous_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], settings: "GenerationConfig", pages: int | None = None
) -> list[list[int]]:
    """The answer tokens of every prompt, with the end token where one was reached.

    `pages` of the key-value cache, by default as many as fit in the free memory of the GPU; with fewer than the prompts
    need, some wait. Raises HostError if the engine fails, which transformers only logs.
    """
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages)
    answers = cast(Generator, model).generate_batch([list(ids) for ids in prompts], settings, config, warmup=False)
    errors = [answer.error for answer in answers.values() if answer.error]
    if errors or len(answers) < len(prompts):
        reason = errors[0] if errors else "not every prompt was answered"
        raise HostError(f"continuous batching has failed ({reason}): use hardware.generation=padded")
    return [answer.generated_tokens for answer in answers.values()]
