"""Objective: a backbone with adapters and its training task; methods build on its loss and its predictions."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NotRequired, Self, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import ClassWeights, EvaluationOptions
from clpet.data.batches import Batch, Encoded, EncodedDataset, encode_benchmark
from clpet.data.benchmark import Benchmark, Example
from clpet.data.micro_batches import MicroBatchLimits
from clpet.data.traits import Traits
from clpet.errors import ConfigError, ModelError
from clpet.models.adapters import Adapters
from clpet.models.architectures import first_position
from clpet.models.backbone import Architecture, Backbone
from clpet.models.flops import Pass
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import Tokenizer, config_of, network_of
from clpet.objectives.cost_meter import FlopsOfPasses, Meter
from clpet.runtime.hardware import Hardware

if TYPE_CHECKING:
    from clpet.objectives.classification import Head

log = logging.getLogger(__name__)

Columns = dict[str, Tensor | np.ndarray]  # one value per example
# Options of `evaluation` that only some objectives use, and which.
NOT_FOR_ALL = {"decode": "text_to_text", "max_new_tokens": "text_to_text", "stride": "language_modeling",
               "bos": "language_modeling", "rank_prompts": "language_modeling", "metrics": "classification",
               "keep_text": "objectives with labels or answers"}  # fmt: skip
Encode = Callable[[list[Example], list[int], list[int]], EncodedDataset]


class HeadState(TypedDict):
    """The rows of a classification head and their labels."""

    labels: list[int]
    weight: Tensor  # [rows, dim]
    bias: Tensor  # [rows]


class ObjectiveState(TypedDict):
    """The state of an objective."""

    adapters: dict[str, dict[str, Tensor]]
    head: NotRequired[HeadState]


@dataclass
class AnswerSpace:
    """The allowed answers: label ids, and each example's task if the method is given task ids at test time."""

    labels: Sequence[int]
    tasks: Tensor | None = None

    def mask(self, scores: Tensor) -> Tensor:
        """[batch, all labels]: the scores, with minus infinity for labels that are not allowed."""
        allowed = torch.full((scores.shape[1],), float("-inf"), device=scores.device)
        allowed[torch.as_tensor(self.labels, device=scores.device, dtype=torch.long)] = 0
        return scores + allowed


@dataclass
class Predictions:
    """[batch, all labels] scores, or answers as texts; [batch, K] modules that produced them; extras to record."""

    scores: Tensor | None = None
    modules: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] | None = None

    @classmethod
    def from_parts(cls, parts: "list[tuple[Tensor, Predictions]]") -> "Predictions":
        """The predictions of a batch from [(rows of the batch, predictions of these rows)]."""
        order = torch.cat([rows for rows, _ in parts]).argsort()
        pieces = [predictions for _, predictions in parts]
        scores = [piece.scores for piece in pieces if piece.scores is not None]
        texts = [text for piece in pieces for text in piece.texts or []]
        return cls(
            extras={name: torch.cat([piece.extras[name] for piece in pieces])[order] for name in pieces[0].extras},
            scores=torch.cat(scores)[order] if scores else None,
            texts=[texts[index] for index in order.tolist()] if texts else None,
        )


@dataclass(frozen=True)
class TaskScore:
    """A score (in percent if it is a share of correct answers), and the sums that it is computed from."""

    value: float
    correct: float
    total: float


@dataclass
class Objective:
    """The network with adapters, tokenizer and cost meter; subclasses define the loss and the predictions.

    A subclass is a dataclass whose annotated fields are the options of its YAML.
    """

    name: str = ""

    traits: ClassVar[Traits]  # what data, methods, memories and records must know of it
    evaluation_options: ClassVar[tuple[str, ...]] = ()  # those of NOT_FOR_ALL that it uses
    unrecorded: ClassVar[tuple[str, ...]] = ()  # columns of `score` that are for validation and not for predictions

    def setup(
        self,
        benchmark: Benchmark,
        backbone: Backbone,
        adapters: Adapters,
        tokenizer: Tokenizer,
        seed: int,
        hardware: Hardware,
        evaluation: EvaluationOptions,
        cache_dir: str | None = None,
        class_weights: ClassWeights = ClassWeights.none,
    ) -> Self:
        """Gives it what it works with, after data and network are loaded; called once. Returns itself.

        `cache_dir` is a folder that runs share. The attribute `benchmark` has lengths that fit the model.
        """
        self.backbone, self.adapters, self.tokenizer = backbone, adapters, tokenizer
        self.seed, self.evaluation, self.cache_dir = seed, evaluation, cache_dir
        self.class_weights = class_weights
        self.eval_batch_size, self.generation = hardware.eval_batch_size, hardware.generation
        self.padding_free = hardware.padding_free
        self.micro_batches = MicroBatchLimits(hardware.micro_batch_size, hardware.max_tokens)
        self.device, self.dtype = hardware.torch_device, hardware.torch_dtype
        self.dim = int(config_of(adapters.model).hidden_size)
        self.meter = Meter(self.device)
        self.flops = FlopsOfPasses(adapters)
        self.prompt: Callable[[Batch], Tensor] | None = None  # [batch, p, dim] in front of the text's embeddings
        self.new_tasks = range(0)  # the tasks that are being learned for the first time
        self.benchmark = self.fit_length(benchmark)
        self.encode_split = self.encoder(self.benchmark, backbone, tokenizer)
        self.finish_setup()
        return self

    def finish_setup(self) -> None:
        """Sets what a subclass has in addition; called once, at the end of `setup`."""

    @property
    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """A new context in which the products of a trained backbone are computed in its precision.

        One object that is entered a second time inside itself would leave autocast on for the rest of the process.
        """
        full = self.adapters.traits.full and self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if full else contextlib.nullcontext()

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Columns of the data that an example needs besides text and label; they become its fields."""
        return ()

    @property
    def causal(self) -> bool:
        """Whether the backbone is a decoder, which reads from left to right."""
        return self.backbone.architecture is Architecture.decoder

    def fit_length(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark with max_length lowered to what the model can read.

        Raises ModelError if the user has set it, or if no position is left for a text.
        """
        config = config_of(self.adapters.model)
        if len(self.tokenizer) > config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model's embedding only {config.vocab_size}"
            )
        longest = longest_input(self.adapters)
        if longest is None:
            return benchmark
        max_length, reserved = benchmark.max_length, benchmark.reserved_positions
        answer = self.max_input_length(benchmark) - max_length
        room = longest - answer - reserved
        plus = f" and an answer of {answer}" if answer else ""
        plus += f" and {reserved} prompt vectors" if reserved else ""
        reads = f"this model reads at most {longest} tokens"
        if benchmark.length_set and max_length + answer > longest:
            raise ModelError(f"benchmark.max_length={max_length}{plus}, but {reads}")
        if room < 1:
            raise ModelError(f"{plus.removeprefix(' and ')} leave no room for a text: {reads}")
        if max_length <= room:
            return benchmark
        log.warning("benchmark.max_length is lowered from %d to %d%s: %s", max_length, room, plus, reads)
        return replace(benchmark, max_length=room)

    def max_input_length(self, benchmark: Benchmark) -> int:
        """Tokens of the longest input that the benchmark's settings allow."""
        return benchmark.max_length

    def check(self, backbone: Backbone, peft: FullFineTuning, evaluation: EvaluationOptions) -> None:
        """Raises ConfigError for incompatible settings, before anything is loaded."""
        defaults = EvaluationOptions()
        for option, users in NOT_FOR_ALL.items():
            if option not in self.evaluation_options and getattr(evaluation, option) != getattr(defaults, option):
                raise ConfigError(f"evaluation.{option} is for {users}; objective={self.name} does not use it")
        if self.traits.frozen_backbone and not peft.traits.keeps_backbone:
            raise ConfigError(
                f"objective={self.name} compares with the model whose adapter is switched off, which peft={peft.name} "
                "does not have: use peft=lora, for example"
            )
        if backbone.head_dropout and not self.traits.has_labels:
            raise ConfigError(f"model.head_dropout is for classification; objective={self.name} has no head")

    def check_benchmark(self, benchmark: Benchmark, evaluation: EvaluationOptions) -> None:
        """Raises ConfigError for tasks that cannot be evaluated as configured, before the backbone is loaded."""

    def encoder(self, benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> Encode:
        """A function that turns examples into an EncodedDataset; needs no weights."""
        raise NotImplementedError

    def encode(self) -> Encoded:
        """The benchmark's splits, tokenised once."""
        return encode_benchmark(self.benchmark, self.encode_split)

    def masks(self, batch: Batch) -> list[Tensor]:
        """[batch, length] for each text that `logits` passes through the network: 1 for tokens, 0 for padding."""
        return [batch.attention_mask]

    def inputs(self, batch: Batch) -> Mapping[str, Tensor | None]:
        """Inputs of the backbone: token ids, or a prompt followed by the embeddings of the tokens."""
        mask = batch.attention_mask if batch.padded else None
        if self.prompt is None:
            self.flops.prompt_vectors = 0
            return {"input_ids": batch.input_ids, "attention_mask": mask}
        text = network_of(self.adapters.model).get_input_embeddings()(batch.input_ids)
        prompt = self.prompt(batch).to(text.dtype)
        self.flops.prompt_vectors = prompt.shape[1]
        if mask is not None:
            mask = torch.cat([mask.new_ones(prompt.shape[:2]), mask], dim=1)
        return {"inputs_embeds": torch.cat([prompt, text], dim=1), "attention_mask": mask}

    def work(self, batch: Batch) -> Pass:
        """The shape of a pass of a batch, without prompts in front."""
        return Pass(len(batch), batch.input_ids.shape[1])

    def count(self, batch: Batch, gradient: bool | None = None) -> None:
        """Adds a pass of a batch, which has just been made, to the cost; by default with a backward pass if it can."""
        flops, work, default = self.flops.network, self.work(batch), torch.is_grad_enabled()
        backward = flops.backward(work) if (default if gradient is None else gradient) else None
        self.meter.count(batch, flops.forward(work), backward)

    def memory_advice(self) -> str:
        """The option to lower if the memory is too small for a pass without gradients."""
        return f"{self.eval_batch_size} examples in a pass without gradients: lower hardware.eval_batch_size"

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """The rows as batches for prediction, sorted by length."""
        return pool.by_length(rows, self.eval_batch_size)

    def logits(self, batch: Batch) -> Tensor:
        """[terms, classes]: logits of the softmax in the loss, one row per term of its mean."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """[terms]: the class of each row of `logits`."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the terms of the batch."""
        return F.cross_entropy(self.logits(batch), self.targets(batch))

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Scores over all labels (`score` masks those outside `choices`), or texts."""
        raise NotImplementedError

    def score(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, task_aware: Predictions | None = None
    ) -> Columns:
        """Columns of an evaluation, one value per example: the answer, its `score` (higher is better) and `own_score`.

        `own_score` is that of the task-incremental view, from the predictions `task_aware` with the task id given; by
        default they are `predictions`. Validation uses `score` alone.
        """
        raise NotImplementedError

    def answers(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, known_task: bool = False
    ) -> Columns:
        """Columns of the answers to new texts: `prediction`, a label id or a text, and what else the objective knows.

        With `known_task` the predictions are for the tasks of the batch, and only their labels compete.
        """
        if predictions.texts is None:
            raise ConfigError(f"objective={self.name} scores given answers: it predicts no labels and no answers")
        return {"prediction": np.array(predictions.texts, dtype=object)}

    def prompts(self, examples: list[Example], tasks: list[int]) -> EncodedDataset:
        """New texts without a target, tokenised for prediction; task numbers are -1 where the task is not known."""
        return self.encode_split(examples, [-1] * len(examples), tasks)

    def aggregate(self, rows: dict[str, np.ndarray], task_incremental: bool = False) -> TaskScore:
        """The score of one task from the columns of its examples, in the class- or task-incremental view."""
        scores = rows["own_score" if task_incremental else "score"]
        return TaskScore(100 * float(scores.mean()), float(scores.sum()), int(scores.size))

    def diagnostics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Further metrics of one task, from the columns of its examples."""
        return {}

    def extra_evaluation(self, answer: Callable[[Batch], Predictions]) -> dict[str, float]:
        """Further metrics of a model, measured at every evaluation; `answer` predicts with the method."""
        return {}

    def describe(self, pool: EncodedDataset, row: int) -> str:
        """The expected output of one example, as a line of text."""
        raise NotImplementedError

    def add_labels(self, labels: Sequence[int]) -> None:
        """Adds head rows for new labels; the rows of old labels do not change."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters other than the adapter's, by name."""
        return {}

    def heads(self) -> "dict[str, Head]":
        """Heads by name."""
        return {}

    def state(self) -> ObjectiveState:
        """State dict: the adapters, and what a subclass adds."""
        return {"adapters": self.adapters.state()}

    def load(self, state: ObjectiveState) -> None:
        """Restores what `state` returned."""
        for name, tensors in state["adapters"].items():
            self.adapters.load(name, tensors)


def longest_input(adapters: Adapters) -> int | None:
    """Number of positions of the backbone, minus the virtual tokens of prompt tuning; None without a limit."""
    config = config_of(adapters.model)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    virtual: int = getattr(adapters.config, "num_virtual_tokens", 0) or 0
    return positions - first_position(config) - virtual
