"""preference: the model learns which of two answers to a prompt is preferred, by direct preference optimisation.

Rafailov et al., 2023, arXiv 2305.18290, equation 7:
    L = - mean over pairs of log sigmoid(r(chosen) - r(rejected))
    r(y) = beta (log pi(y | prompt) - log pi_ref(y | prompt))
where log pi(y | prompt) is the sum of the log-probabilities of y's tokens and its end token. The reference policy
pi_ref is the backbone with its adapters switched off. A pair is ranked right if r(chosen) > r(rejected); a tie, such as
all pairs before the first task, counts one half.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clpet.config.schema import EvaluationOptions, require
from clpet.data.batches import IGNORED, AnswerBatch, Batch, EncodedDataset, Ragged, to_device
from clpet.data.benchmark import SPLITS, Benchmark, Example
from clpet.data.template import Tokenised
from clpet.data.traits import Traits
from clpet.errors import DataError
from clpet.models.backbone import Backbone
from clpet.models.protocols import Tokenizer
from clpet.objectives.answer_encoding import encode_answers
from clpet.objectives.base import AnswerSpace, Columns, Encode, Predictions
from clpet.objectives.text_to_text import TextToText


class Pairs(EncodedDataset):
    """Prompts with their chosen answers, `answer`, and their rejected ones; every pair is one term of the loss."""

    def __init__(self, prompts: EncodedDataset, rejected: Tokenised) -> None:
        vars(self).update(vars(prompts))  # a data set that TextToText has encoded, with the chosen answers
        self.rejected, self.full_rejected_lengths = Ragged(rejected.rows), np.array(rejected.lengths, np.int64)
        assert self.answer is not None
        self.lengths = self.source.lengths + np.maximum(self.answer.lengths, self.rejected.lengths)
        self.weights = np.ones(len(prompts))
        self.reference: dict[int, Tensor] = {}  # task -> [rows of the task] log pi_ref(chosen) - log pi_ref(rejected)

    def num_truncated(self, rows: np.ndarray) -> tuple[int, int]:
        """A pair counts once, however many of its answers are truncated."""
        assert self.answer is not None
        chosen = self.full_answer_lengths[rows] > self.answer.lengths[rows]
        rejected = self.full_rejected_lengths[rows] > self.rejected.lengths[rows]
        return super().num_truncated(rows)[0], int((chosen | rejected).sum())

    def padded_tokens(self, rows: np.ndarray) -> int:
        """Those of one of the two passes over the pairs, the larger one."""
        rejected = len(rows) * int(self.source.lengths[rows].max() + self.rejected.lengths[rows].max())
        return max(super().padded_tokens(rows), rejected)

    def with_rejected(self, batch: AnswerBatch) -> AnswerBatch:
        """The batch with the rejected answers as its targets."""
        targets = torch.from_numpy(self.rejected.padded(batch.rows, IGNORED)[0])
        return dataclasses.replace(batch, targets=to_device(targets, batch.input_ids.device))


@dataclass
class Preference(TextToText):
    """`beta` is the weight of the log-ratios, `rejected` the column with the rejected answer."""

    beta: float = 0.1
    rejected: str = "rejected"

    traits: ClassVar[Traits] = Traits(needs_output_layer=True, frozen_backbone=True, has_logits=False)
    evaluation_options: ClassVar[tuple[str, ...]] = ("keep_text",)

    def __post_init__(self) -> None:
        require(self.beta > 0, "objective.beta", self.beta, "more than 0")
        require(bool(self.rejected), "objective.rejected", repr(self.rejected), "the name of a column")

    @property
    def extra_columns(self) -> tuple[str, ...]:
        return (self.rejected,)

    def check_benchmark(self, benchmark: Benchmark, evaluation: EvaluationOptions) -> None:
        for task in benchmark.tasks:
            for split in SPLITS:
                for example in task.split(split):
                    if example.target == example.fields[self.rejected]:
                        raise DataError(
                            f"task {task.name}: the chosen and the rejected answer to {example.text[:60]!r} are equal "
                            f"({split}): remove such pairs"
                        )

    def encoder(self, benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> Encode:
        encode_chosen = super().encoder(benchmark, backbone, tokenizer)

        def encode(examples: list[Example], labels: list[int], tasks: list[int]) -> EncodedDataset:
            rejected = encode_answers(tokenizer, [e.fields[self.rejected] for e in examples], benchmark.max_target)
            return Pairs(encode_chosen(examples, labels, tasks), rejected)

        return encode

    def prompts(self, examples: list[Example], tasks: list[int]) -> EncodedDataset:
        """Prompts alone, without pairs: the model writes the answer."""
        return super().encoder(self.benchmark, self.backbone, self.tokenizer)(examples, [-1] * len(examples), tasks)

    # The loss

    def loss(self, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.beta * (self.log_ratio(batch) - self.reference(batch))).mean()

    def log_ratio(self, batch: Batch) -> Tensor:
        """[batch]: log pi(chosen | prompt) - log pi(rejected | prompt)."""
        assert isinstance(batch, AnswerBatch)
        assert isinstance(batch.pool, Pairs)
        return self.log_probability(batch) - self.log_probability(batch.pool.with_rejected(batch))

    def log_probability(self, batch: AnswerBatch) -> Tensor:
        """[batch]: log pi(y | prompt), the sum over the tokens of the answers y = `batch.targets`."""
        with self.autocast:
            logits = self.answer_logits(batch, batch.targets).float()
        self.count(batch)
        nll = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
        return -nll.sum(1)

    def reference(self, batch: Batch) -> Tensor:
        """[batch]: log pi_ref(chosen | prompt) - log pi_ref(rejected | prompt), computed once per pair.

        All pairs of a task are computed together, in the same batches every time: a resumed run gets the same bits.
        """
        pool = batch.pool
        assert isinstance(pool, Pairs)
        if self.meter.kind == "learned" and not self.meter.cost.reference_examples:
            self.count_references(pool)
        values, tasks = torch.empty(len(batch), device=self.device), pool.tasks[batch.rows]
        for task in np.unique(tasks).tolist():  # on the host: reading `batch.tasks` would wait for the device
            rows = pool.rows_of(task)
            if task not in pool.reference:
                pool.reference[task] = self.reference_of(pool, rows)
            mine = np.flatnonzero(tasks == task)
            indices = np.searchsorted(rows, batch.rows[mine])
            to, at = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (mine, indices))
            values[to] = pool.reference[task][at]
        return values

    def count_references(self, pool: Pairs) -> None:
        """Adds the reference passes of new tasks to the cost, when the first of them is needed.

        They are not counted where they are made: a resumed run makes them again, also those of earlier tasks.
        """
        for task in self.new_tasks:
            for rows in self.batches(pool, pool.rows_of(task)):
                batch = pool.batch(rows)
                assert isinstance(batch, AnswerBatch)
                for answers in (batch, pool.with_rejected(batch)):
                    self.count(answers, gradient=False)
                    self.meter.cost.reference_examples += len(answers)

    @torch.no_grad()
    def reference_of(self, pool: Pairs, rows: np.ndarray) -> Tensor:
        """[rows] of a task, in their order; `count_references` adds them to the cost."""
        batches = self.batches(pool, rows)
        with self.reference_policy():
            values = torch.cat([self.log_ratio(pool.batch(batch, self.device)) for batch in batches])
        return values[torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.device)]

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """Passes inside go through the backbone alone: no adapter, no prompt in front, no dropout; none is counted."""
        prompt, cost = self.prompt, self.meter.cost
        self.prompt, self.meter.cost = None, dataclasses.replace(cost)
        try:
            with self.adapters.evaluating(), self.adapters.off():
                yield
        finally:
            self.prompt, self.meter.cost = prompt, cost

    # Prediction and scores

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """The margins of pairs; for prompts alone the answers that the model writes."""
        if not isinstance(batch.pool, Pairs):
            return super().predict(batch, choices)
        return Predictions(extras={"margin": self.beta * (self.log_ratio(batch) - self.reference(batch))})

    def batch_size(self, task: int) -> int:
        return self.eval_batch_size

    def score(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, task_aware: Predictions | None = None
    ) -> Columns:
        """1 for a pair that is ranked right, 1/2 for a tie; both views are equal unless the method uses task ids."""
        margin, own_margin = predictions.extras["margin"], (task_aware or predictions).extras["margin"]
        return {"score": (margin.sign() + 1) / 2, "own_score": (own_margin.sign() + 1) / 2}

    def describe(self, pool: EncodedDataset, row: int) -> str:
        assert isinstance(pool, Pairs)
        assert pool.answer is not None
        chosen, rejected = (self.tokenizer.decode(answers[row]) for answers in (pool.answer, pool.rejected))
        return f"chosen   {chosen}, rejected {rejected}"
