"""Classification: a linear head on a representation of the text, with a row for each label seen so far."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import ClassWeights, EvaluationOptions, LabelMetric
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset, pad_id
from clpet.data.benchmark import Benchmark, Example
from clpet.data.template import Template
from clpet.data.traits import LABELS, Traits
from clpet.errors import ConfigError, ModelError
from clpet.metrics.label_scores import label_counts, macro_f1
from clpet.models.backbone import Architecture, Backbone, Representation, representation
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import Tokenizer, network_of
from clpet.objectives.base import AnswerSpace, Columns, Encode, HeadState, Objective, ObjectiveState, Predictions

MISSING = -100.0  # logit of a label that no selected module scores (ConPET, section 3.7)


class Head(nn.Module):
    """logits = W h + b over a growing list of labels; `labels` are global label ids, one per row.

    A row is initialised from U(-1/sqrt(d), 1/sqrt(d)) with the seed (seed, label name), so it depends neither on the
    order of the tasks nor on the number of labels. Growing copies old rows bit for bit.
    """

    def __init__(self, dim: int, names: Sequence[str], seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        start = torch.stack([_initial_row(dim, seed, name) for name in names]) if names else torch.empty(0, dim + 1)
        self.register_buffer("start", start.to(device))
        self._set_labels([])
        self.weight = nn.Parameter(self.start[:0, :-1].clone())
        self.bias = nn.Parameter(self.start[:0, -1].clone())

    start: Tensor

    def _set_labels(self, labels: list[int]) -> None:
        """Sets the labels of the rows, also as `ids` [rows] on the device: an index that is a list is copied there."""
        self.labels = labels
        self.ids = torch.tensor(labels, dtype=torch.long, device=self.start.device)
        self.column = torch.full((len(self.start),), -1, dtype=torch.long, device=self.start.device)  # by label id
        self.column[self.ids] = torch.arange(len(labels), device=self.start.device)

    def grow(self, labels: Sequence[int]) -> None:
        """Adds rows for the label ids that have none; the old rows do not change."""
        new = [label for label in labels if label not in self.labels]
        if new:
            rows = self.start[new]
            self.weight = nn.Parameter(torch.cat([self.weight.detach(), rows[:, :-1]]))
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), rows[:, -1]]))
            self._set_labels([*self.labels, *new])

    def forward(self, h: Tensor) -> Tensor:
        """[batch, dim] -> [batch, rows], columns in the order of `labels`."""
        return F.linear(h, self.weight, self.bias)

    def columns(self, labels: Tensor) -> Tensor:
        """Columns of this head for label ids; every id must have a row."""
        return self.column[labels]

    def scatter(self, h: Tensor) -> Tensor:
        """[batch, dim] -> [batch, all labels]; a label without a row is scored by its initial row."""
        logits = F.linear(h, self.start[:, :-1], self.start[:, -1])
        if self.labels:
            logits[:, self.ids] = self(h).to(logits.dtype)
        return logits

    def state(self) -> HeadState:
        """Rows and their labels."""
        return {"labels": list(self.labels), "weight": self.weight.detach(), "bias": self.bias.detach()}

    def load(self, state: HeadState) -> None:
        """Restores what `state` returned."""
        self._set_labels(list(state["labels"]))
        self.weight = nn.Parameter(state["weight"].to(self.start.device))
        self.bias = nn.Parameter(state["bias"].to(self.start.device))


def _initial_row(dim: int, seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive(seed, "head row", name))
    row: Tensor = (torch.rand(dim + 1, generator=generator) * 2 - 1) / dim**0.5
    return row


@dataclass
class Classification(Objective):
    """A softmax over a head's labels, by default over all labels seen so far."""

    traits: ClassVar[Traits] = LABELS
    evaluation_options: ClassVar[tuple[str, ...]] = ("metrics", "keep_text")

    def finish_setup(self) -> None:
        benchmark = self.benchmark
        self.in_task_softmax = False  # inside `softmax_of_task`
        self.representation = representation(self.backbone, benchmark.template)
        self.pooler = self.load_pooler() if self.representation is Representation.pooled else None
        self.head = self.new_head(self.seed)
        mask = torch.full((len(benchmark), len(benchmark.labels)), float("-inf"))
        for index in range(len(benchmark)):
            mask[index, benchmark.task_labels(index)] = 0
        self.task_label_mask = mask.to(self.device)  # [tasks, labels]: minus infinity for labels of other tasks
        balanced = self.class_weights is ClassWeights.balanced
        self.label_weights = balanced_weights(benchmark).to(self.device) if balanced else None

    def check(self, backbone: Backbone, peft: FullFineTuning, evaluation: EvaluationOptions) -> None:
        """Also rejects prefixes of an encoder-decoder's encoder, which has no cache of keys and values."""
        super().check(backbone, peft, evaluation)
        if peft.traits.prefixes and backbone.architecture is Architecture.encoder_decoder:
            raise ConfigError(
                f"peft={peft.name} does not support the encoder of an encoder-decoder: set peft=prompt or peft=lora"
            )

    def encoder(self, benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> Encode:
        needs_mask = representation(backbone, benchmark.template) is Representation.mask
        template = Template(
            tokenizer, benchmark.template, benchmark.max_length, needs_mask, truncate=benchmark.truncate
        )

        def encode(examples: list[Example], labels: list[int], tasks: list[int]) -> EncodedDataset:
            texts = template.encode(examples)
            return EncodedDataset(
                texts.rows, labels, tasks, pad_id(tokenizer), template.mask_id, full_lengths=texts.lengths
            )

        return encode

    def load_pooler(self) -> nn.Module:
        """The network's pooler, a layer after the last one. Raises ModelError if there is none."""
        pooler = getattr(self.adapters.model, "pooler", None)
        if not isinstance(pooler, nn.Module):
            raise ModelError(
                f"model.representation=pooled, but model {self.backbone.name} has no pooler: use cls, mean or last"
            )
        return pooler

    def new_head(self, seed: int, names: Sequence[str] | None = None) -> Head:
        """An empty head over the benchmark's labels (or over other names, such as task names)."""
        return Head(self.dim, self.benchmark.labels if names is None else names, seed, self.device)

    def features(self, batch: Batch) -> Tensor:
        """[batch, dim] fp32: the last hidden state after the final norm, pooled according to model.representation.

        In training with dropout of rate model.head_dropout.
        """
        with self.autocast:
            hidden = network_of(self.adapters.model)(**self.inputs(batch)).last_hidden_state
        self.count(batch)
        hidden = hidden[:, -batch.input_ids.shape[1] :]  # without the prompt in front
        h: Tensor = self.pooler(hidden).float() if self.pooler else pool(hidden, batch, self.representation)
        return F.dropout(h, self.backbone.head_dropout, self.adapters.training)

    def logits(self, batch: Batch) -> Tensor:
        """[batch, head rows]."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """[batch]: the label's column of the head."""
        return self.head.columns(batch.labels)

    def loss(self, batch: Batch) -> Tensor:
        return self.cross_entropy(self.logits(batch), batch)

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy over the labels seen so far; with benchmark.softmax=task over those of each example's task."""
        if self.benchmark.per_task_softmax or self.in_task_softmax:
            logits = logits + self.task_label_mask[batch.tasks][:, self.head.ids]
        return self.mean_cross_entropy(logits, self.targets(batch), batch)

    @contextlib.contextmanager
    def softmax_of_task(self) -> Iterator[None]:
        """Losses inside are over the labels of each example's task."""
        self.in_task_softmax = True
        try:
            yield
        finally:
            self.in_task_softmax = False

    def mean_cross_entropy(self, logits: Tensor, columns: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch of the cross-entropy of [batch, columns] logits, each example times its label's weight.

        Dividing by the number of examples, not by the sum of their weights, makes the gradient of an epoch independent
        of which examples share a batch.
        """
        if self.label_weights is None:
            return F.cross_entropy(logits, columns)
        weights = self.label_weights[batch.tasks, batch.labels]
        return (weights * F.cross_entropy(logits, columns, reduction="none")).mean()

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        return Predictions(self.head.scatter(self.features(batch)))

    def score(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, task_aware: Predictions | None = None
    ) -> Columns:
        """Two views: all seen labels compete, so a task not learned yet scores 0; or only the task's own labels."""
        best = self.answers(batch, predictions, choices)
        best_of_task = self.answers(batch, task_aware or predictions, choices, known_task=True)["prediction"]
        return {
            "label": batch.labels,
            "prediction": best["prediction"],
            "own_prediction": best_of_task,
            "probability": best["probability"],
            "score": best["prediction"] == batch.labels,
            "own_score": best_of_task == batch.labels,
        }

    def answers(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, known_task: bool = False
    ) -> Columns:
        """The best label and its probability among the allowed labels, with `known_task` those of each text's task."""
        scores = predictions.scores
        assert scores is not None
        allowed = scores + self.task_label_mask[batch.tasks] if known_task else choices.mask(scores)
        return {"prediction": _best(allowed), "probability": _probability(allowed)}

    def diagnostics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        if LabelMetric.macro_f1 not in self.evaluation.metrics:
            return {}
        return {"macro_f1": macro_f1(label_counts(rows["label"].tolist(), rows["prediction"].tolist()))}

    def describe(self, pool: EncodedDataset, row: int) -> str:
        return f"label    {self.benchmark.labels[pool.labels[row]]} (representation: {self.representation.value})"

    def add_labels(self, labels: Sequence[int]) -> None:
        self.head.grow(labels)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.head.named_parameters())

    def heads(self) -> dict[str, Head]:
        return {"default": self.head}

    def state(self) -> ObjectiveState:
        return {**super().state(), "head": self.head.state()}

    def load(self, state: ObjectiveState) -> None:
        super().load(state)
        self.head.load(state["head"])


def balanced_weights(benchmark: Benchmark) -> Tensor:
    """[tasks, labels]: n / (k n_label), from the labels of each task's n training examples; their mean weight is 1."""
    weights = torch.zeros(len(benchmark), len(benchmark.labels))
    for index, task in enumerate(benchmark.tasks):
        counts = Counter(benchmark.label_ids[str(example.target)] for example in task.train)
        for label, count in counts.items():
            weights[index, label] = len(task.train) / (len(counts) * count)
    return weights


def _best(scores: Tensor) -> Tensor:
    """[batch]: the label with the highest score, the lowest id of a tie; -1 where no label is allowed."""
    value, label = scores.max(1)
    return torch.where(value == float("-inf"), -1, label)


def _probability(scores: Tensor) -> Tensor:
    """[batch] fp32: the softmax of the highest score among the allowed labels; NaN where no label is allowed."""
    probability: Tensor = scores.float().softmax(1).max(1).values
    return probability


def pool(hidden: Tensor, batch: Batch, how: Representation) -> Tensor:
    """[batch, length, dim] -> [batch, dim] in fp32."""
    mask = batch.attention_mask
    if how is Representation.mean:
        weights = mask / mask.sum(1, keepdim=True)
        return torch.einsum("bl,bld->bd", weights, hidden.float())
    if how is Representation.cls:
        return hidden[:, 0].float()
    rows = torch.arange(len(hidden), device=hidden.device)
    position = batch.positions if how is Representation.mask else mask.sum(1) - 1
    return hidden[rows, position].float()
