"""LAMOL: the model that answers also writes the examples that it replays (Sun et al., 2020, arXiv 1909.03329).

With ANS and GEN new tokens, every example is learned in two forms, x -> `question` ANS `answer` and GEN -> all of it:
    L = CE(answer | question ANS) + weight CE(question ANS answer | GEN)
CE is a mean over tokens, in which ANS counts `answer_token_weight` times. Before task t >= 2 the model writes
    G = ceil(gamma n_t) minus its remainder by t - 1
texts that begin with GEN, token by token from the `top_k` most likely ones. Those with exactly one ANS are learned
together with the n_t new examples. An encoder-decoder has GEN in its encoder, and its questions have no ANS.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset, pad_id
from clpet.data.benchmark import Benchmark, Task
from clpet.data.template import special_tokens
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.new_tokens import NewTokens
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import network_of
from clpet.objectives.answer_encoding import until
from clpet.objectives.base import AnswerSpace, Objective, Predictions, longest_input
from clpet.objectives.generation import InverseTransform, greedy, padded_answers
from clpet.objectives.text_to_text import TextToText
from clpet.records import State
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.network import gathered
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)

WRITTEN_TOGETHER = 32  # texts in a batch that is written


@dataclass
class LAMOL(Method[TextToText]):
    """Stores nothing but the vectors of the new tokens; GEN is one token, or with `task_tokens` one for every task."""

    gamma: float = 0.2
    weight: float = 0.25
    top_k: int = 20
    task_tokens: bool = False
    answer_token_weight: float = 5.0

    needs_logits: ClassVar[bool] = True
    supports_plain_text: ClassVar[bool] = False
    reads_activations: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False  # its prompts end with a token that no other program has
    unshardable: ClassVar[str] = "adds tokens to the embedding"
    saved: ClassVar[tuple[str, ...]] = ("tokens.rows=tokens",)
    saved_in_task: ClassVar[tuple[str, ...]] = ("written",)

    @classmethod
    def unmet(cls, traits: Traits) -> str:
        return "it writes questions and their answers" if traits.has_labels else super().unmet(traits)

    def __post_init__(self) -> None:
        require(self.gamma >= 0, "method.gamma", self.gamma, "0 or more")
        require(self.weight >= 0, "method.weight", self.weight, "0 or more")
        require(self.top_k >= 1, "method.top_k", self.top_k, "at least 1")
        require(self.answer_token_weight > 0, "method.answer_token_weight", self.answer_token_weight, "more than 0")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if peft.traits.prepends or peft.traits.prefixes:
            raise ConfigError(
                f"method={self.name} trains the vectors of new tokens, which peft={peft.name} does not support: use "
                "peft=lora"
            )

    def check_benchmark(self, benchmark: Benchmark) -> None:
        if getattr(benchmark, "chat", None):
            raise ConfigError(f"method={self.name} has a format of its own and does not support benchmark.chat")

    def reserved_positions(self, benchmark: Benchmark) -> int:
        return 1  # [GEN question ANS answer] without its end is one longer than [question answer]

    def init_adapters(self) -> None:
        super().init_adapters()
        count = 1 + (len(self.benchmark) if self.task_tokens else 1)
        self.tokens = NewTokens(self.objective.adapters.model, count, self.seed)
        self.ans = self.tokens.first
        self.written: list[list[list[int]]] = []  # of every old task: the texts that were written and are replayed
        self.prepared = -1  # the task whose pools have been made
        self.statistics: dict[str, float] = {}

    def gen(self, task: int) -> int:
        """The id of a task's GEN."""
        return self.ans + 1 + (task if self.task_tokens else 0)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().named_parameters(), "new_tokens": self.tokens.rows}

    # Answering

    def with_ans(self, batch: Batch) -> Batch:
        """The batch with ANS behind the prompts that a decoder continues."""
        if not self.objective.causal:
            return batch
        column = batch.input_ids[:, :1]
        ids = torch.cat([batch.input_ids, torch.full_like(column, self.ans)], 1)
        return replace(
            batch, input_ids=ids, attention_mask=torch.cat([batch.attention_mask, torch.ones_like(column)], 1)
        )

    def logits(self, batch: Batch) -> Tensor:
        return self.objective.logits(self.with_ans(batch))

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        return self.objective.predict(self.with_ans(batch), choices)

    # Learning

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        ahead = trainer.checkpointer.method_state_ahead()
        if ahead is not None:  # a stopped run has written them already
            self.written = cast(list[list[list[int]]], ahead["written"])
        else:
            self.written = self.write(index)
        self.note(index)
        self.pool, self.texts = self.pools(index)
        self.prepared = index
        super().learn(task, index, trainer)

    def note(self, index: int) -> None:
        """Records how many of the texts could be read; warns if none could."""
        count, read = self.count(index), sum(map(len, self.written))
        self.statistics = {"written": float(count), "parsed_share": read / count} if count else {}
        if count and not read:
            log.warning("none of the %d texts that the model wrote has a question and an answer", count)

    def count(self, index: int) -> int:
        """G, the number of texts that are written before task `index`."""
        return num_written(len(self.data.train.rows_of(index)), index, self.gamma)

    def pools(self, index: int) -> tuple[EncodedDataset, EncodedDataset]:
        """New and written examples as questions with answers, and the same rows as texts that begin with GEN."""
        train, new = self.data.train, self.data.train.rows_of(index)
        assert train.answer is not None
        prompts = [train.source[row].tolist() for row in new]
        answers = [train.answer[row].tolist() for row in new]
        tasks = [index] * len(new)
        for old, texts in enumerate(self.written):
            for text in texts:
                question, answer = split(text, self.ans)
                prompts.append(self.prompt(question))
                answers.append([*answer[: self.objective.benchmark.max_target - 1], self.objective.ends[0]])
                tasks.append(old)
        no_labels, pad, left = [-1] * len(tasks), pad_id(self.objective.tokenizer), self.objective.causal
        texts = [self.text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        generators = [[self.gen(task)] for task in tasks]
        return (
            EncodedDataset(prompts, no_labels, tasks, pad, answers=answers, left=left),
            EncodedDataset(generators, no_labels, tasks, pad, answers=texts, left=left),
        )

    def prompt(self, question: list[int]) -> list[int]:
        """A question as a prompt: with the special tokens of the model, and cut as all prompts are."""
        head, tail = special_tokens(self.objective.tokenizer)
        tail = [] if self.objective.causal else tail
        return [*head, *question[: self.objective.benchmark.max_length - len(head) - len(tail)], *tail]

    def text(self, prompt: list[int], answer: list[int]) -> list[int]:
        """[question ANS answer]: an example as it is written, without the special tokens of its prompt."""
        head, tail = special_tokens(self.objective.tokenizer)
        question = prompt[len(head) : len(prompt) - (0 if self.objective.causal else len(tail))]
        limit = longest_input(self.objective.adapters)
        room = None if limit is None else limit - len(answer) - 2
        return [*question[:room], self.ans, *answer]

    def plan(self, index: int) -> BatchPlan:
        """Before anything is written, as in a dry run, old examples stand for what will be."""
        size, seed_key = self.replay.batch_size, self.replay.seed_key(index)
        if self.prepared == index:
            pool, rows = self.pool, np.arange(len(self.pool))
        else:
            pool, old = self.data.train, self.data.train.rows_of(*range(index))
            rows = np.concatenate([pool.rows_of(index), np.resize(old, self.count(index) if len(old) else 0)])
        return BatchPlan(
            pool, -(-len(rows) // size), lambda epoch: pool.shuffled(rows, size, self.replay.rng(seed_key, "", epoch))
        )

    def before_step(self, context: StepContext) -> None:
        """Sums the weights of all tokens of the step's texts; every text has one ANS."""
        self.total = float(self.texts.weights[context.rows].sum()) + len(context.rows) * (self.answer_token_weight - 1)

    def loss(self, context: StepContext) -> Tensor:
        loss = self.objective.loss(self.with_ans(context.batch))
        if not self.weight:
            return loss
        texts = self.texts.batch(context.batch.rows, self.objective.device)
        targets = self.objective.targets(texts)
        weights = token_weights(targets, self.ans, self.answer_token_weight)
        total = weighted_nll(self.objective.logits(texts), targets, weights)
        # The trainer weights a micro-batch by its share of the batch; dividing makes this a mean over all its tokens.
        return loss + self.weight * total / (self.total * context.batch.share)

    # Writing

    def write(self, index: int) -> list[list[list[int]]]:
        """The texts of every old task that have a question and an answer, as token ids without the end."""
        count = self.count(index)
        if not count:
            return []
        numbers = range(count)
        groups = [numbers[start : start + WRITTEN_TOGETHER] for start in range(0, count, WRITTEN_TOGETHER)]
        with gathered(self.objective.adapters.model):
            texts = get_world().map(partial(self.write_group, index), groups)
        written: list[list[list[int]]] = [[] for _ in range(index)]
        for number, text in enumerate(text for group in texts for text in group):
            if is_example(text, self.ans):
                written[number * index // count].append(text)
        return written

    def write_group(self, index: int, numbers: Sequence[int]) -> list[list[int]]:
        """The texts of these numbers; each depends on its number and not on the others."""
        objective, count = self.objective, self.count(index)
        benchmark, limit, pad = objective.benchmark, longest_input(objective.adapters), pad_id(objective.tokenizer)
        longest = benchmark.max_length + benchmark.max_target + 1
        new_tokens = longest if limit is None else min(longest, limit - 1)
        tasks = [number * index // count for number in numbers]
        generators, ends = [[self.gen(task)] for task in tasks], [objective.ends[:1]] * len(tasks)
        pool = EncodedDataset(generators, [-1] * len(tasks), tasks, pad, answers=ends, left=objective.causal)
        batch = pool.batch(np.arange(len(pool)), objective.device)
        seeds = [derive(self.seed, "lamol", self.replay.seed_key(index), number) for number in numbers]
        uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(new_tokens) for seed in seeds]))
        draw = InverseTransform(uniform.to(objective.device), 1.0, self.top_k)
        settings = greedy(new_tokens, objective.ends, pad, objective.start)
        with objective.autocast:
            network, inputs = network_of(objective.adapters.model), objective.inputs(batch)
            texts = padded_answers(network, inputs, settings, objective.causal, draw)
        objective.count(batch, gradient=False)
        return until(texts, objective.ends)

    def load_state_dict(self, state: State) -> None:
        """A state of fewer tasks has no token of the later ones."""
        loaded = cast(Tensor, state["tokens"])
        later = self.tokens.rows.detach()[len(loaded) :].to(loaded.device)
        super().load_state_dict({**state, "tokens": torch.cat([loaded, later])})

    def save(self, folder: Path) -> None:
        """Writes the adapter, and the vectors of ANS and of GEN."""
        super().save(folder)
        save_file({"new_tokens": self.tokens.rows.detach().cpu()}, folder / "new_tokens.safetensors")

    def diagnostics(self) -> dict[str, float]:
        return self.statistics


def num_written(new: int, old_tasks: int, gamma: float) -> int:
    """ceil(gamma n), rounded down to a multiple of the number of old tasks."""
    count = math.ceil(gamma * new - 1e-9)  # 0.2 * 1000 must not be rounded up
    return count - count % old_tasks if old_tasks else 0


def is_example(text: Sequence[int], ans: int) -> bool:
    """Whether a text has one ANS, no other new token, and a question and an answer."""
    return [token for token in text if token >= ans] == [ans] and ans not in (text[0], text[-1])


def split(text: list[int], ans: int) -> tuple[list[int], list[int]]:
    """(question, answer) of a text."""
    position = text.index(ans)
    return text[:position], text[position + 1 :]


def token_weights(targets: Tensor, ans: int, weight: float) -> Tensor:
    """[tokens]: `weight` where the target is ANS, else 1."""
    return torch.where(targets == ans, weight, 1.0)


def weighted_nll(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i (-log p(target i)); logits [tokens, vocabulary]."""
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
