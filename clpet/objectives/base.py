"""Objective: a backbone with adapters and what it is asked to do; the losses and predictions methods build on."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.config.schema import Evaluation
from clpet.data.batches import Batch, Encoded, EncodedDataset, encode_benchmark
from clpet.data.benchmark import Benchmark, Example
from clpet.errors import ModelError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Backbone, first_position
from clpet.objectives.cost_meter import Meter

log = logging.getLogger(__name__)

Encode = Callable[[list[Example], list[int], list[int]], EncodedDataset]


@dataclass
class Choices:
    """What may be answered: label ids, and each example's task only where the method is given it."""

    labels: Sequence[int]
    tasks: Tensor | None = None

    def mask(self, scores: Tensor) -> Tensor:
        """The scores with every label that may not be answered at minus infinity."""
        allowed = torch.full((scores.shape[1],), float("-inf"), device=scores.device)
        allowed[torch.as_tensor(self.labels, device=scores.device, dtype=torch.long)] = 0
        return scores + allowed


@dataclass
class Predictions:
    """[batch, all labels] scores, or answers as texts; [batch, K] modules that gave them; facts worth keeping."""

    scores: Tensor | None = None
    modules: Tensor | None = None
    trace: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] | None = None

    @classmethod
    def joined(cls, parts: "list[tuple[Tensor, Predictions]]") -> "Predictions":
        """The predictions of a batch from those of its parts, each with its rows."""
        order = torch.cat([rows for rows, _ in parts]).argsort()
        scores = [found.scores for _, found in parts if found.scores is not None]
        texts = [text for _, found in parts for text in found.texts or []]
        facts = {name: [found.trace[name] for _, found in parts] for name in parts[0][1].trace}
        return cls(
            trace={name: torch.cat(values)[order] for name, values in facts.items()},
            scores=torch.cat(scores)[order] if scores else None,
            texts=[texts[place] for place in order.tolist()] if texts else None,
        )


@dataclass(frozen=True)
class TaskScore:
    """value (percent where scores are shares of right answers), and the sums behind it."""

    value: float
    correct: float
    total: float


class Objective:
    """Holds the network, its adapters, the tokenizer and the meter; subclasses say what a loss and an answer are."""

    name: ClassVar[str] = ""
    generates: ClassVar[bool] = False  # needs the backbone's own output layer
    cache_dir: str | None = None  # set by the run: a folder for what other runs can use

    def __init__(
        self,
        benchmark: Benchmark,
        backbone: Backbone,
        adapters: Adapters,
        tokenizer: Any,
        seed: int,
        hardware: Any,
        evaluation: Evaluation,
    ) -> None:
        self.benchmark, self.backbone, self.adapters = benchmark, backbone, adapters
        self.tokenizer, self.seed, self.evaluation = tokenizer, seed, evaluation
        self.eval_batch_size = hardware.eval_batch_size
        self.device, self.dtype = hardware.torch_device, hardware.torch_dtype
        self.dim = int(adapters.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.meter = Meter()
        self.prompt: Callable[[Batch], Tensor] | None = None  # [batch, p, dim] put before the text's embeddings
        self._check_lengths()
        self.encode_split = self.encoder(benchmark, backbone, tokenizer)
        full = adapters.full and self.dtype is not torch.float32
        self.autocast = torch.autocast(self.device.type, dtype=self.dtype) if full else contextlib.nullcontext()

    def _check_lengths(self) -> None:
        config: Any = self.adapters.model.config
        if len(self.tokenizer) > config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model's embedding only {config.vocab_size}"
            )
        longest, benchmark = longest_input(self.adapters), self.benchmark
        if longest is None:
            return
        asked, reserved = benchmark.max_length, benchmark.reserved_positions
        answer = self.longest_wanted() - asked
        room = longest - answer - reserved
        beside = (f" and an answer of {answer}" if answer else "") + (
            f" and {reserved} prompt vectors" * bool(reserved)
        )
        reads = f"this model reads at most {longest} tokens"
        if benchmark.length_set and asked + answer > longest:
            raise ModelError(f"benchmark.max_length={asked}{beside}, but {reads}")
        if room < 1:
            raise ModelError(f"{beside.removeprefix(' and ')} leave no room for a text: {reads}")
        if asked > room:
            log.warning("benchmark.max_length is lowered from %d to %d%s: %s", asked, room, beside, reads)
            benchmark.max_length = room

    def longest_wanted(self) -> int:
        """Tokens of the longest input that the benchmark's settings allow."""
        return self.benchmark.max_length

    @classmethod
    def check(cls, backbone: Backbone, peft: str, evaluation: Evaluation) -> None:
        """Raises ConfigError for settings that do not go together, before anything is loaded."""

    @classmethod
    def check_benchmark(cls, benchmark: Benchmark, evaluation: Evaluation) -> None:
        """Raises ConfigError for tasks that cannot be evaluated as asked, before the backbone is loaded."""

    @classmethod
    def encoder(cls, benchmark: Benchmark, backbone: Backbone, tokenizer: Any) -> Encode:
        """What turns examples into an EncodedDataset; needs no weights."""
        raise NotImplementedError

    def encode(self) -> Encoded:
        """The benchmark's splits, tokenised once."""
        return encode_benchmark(self.benchmark, self.encode_split)

    def masks(self, batch: Batch) -> list[Tensor]:
        """[batch, length] of each text that `logits` sends through the network: 1 where it is not padding."""
        return [batch.attention_mask]

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        """What the backbone is given: token ids, or a prompt and the embeddings of the tokens."""
        mask = batch.attention_mask if batch.padded else None
        if self.prompt is None:
            return {"input_ids": batch.input_ids, "attention_mask": mask}
        text = self.adapters.model.get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
        prompt = self.prompt(batch).to(text.dtype)
        if mask is not None:
            mask = torch.cat([mask.new_ones(prompt.shape[:2]), mask], dim=1)
        return {"inputs_embeds": torch.cat([prompt, text], dim=1), "attention_mask": mask}

    def memory_advice(self) -> str:
        """What to lower where the memory does not suffice for a pass without gradients."""
        return f"{self.eval_batch_size} examples in a pass without gradients: lower hardware.eval_batch_size"

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in the batches they are to be predicted in, sorted by length."""
        return pool.by_length(rows, self.eval_batch_size)

    def logits(self, batch: Batch) -> Tensor:
        """[terms, classes]: what the loss takes a softmax of, one row per term of its mean."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """[terms]: the class of each row of `logits`."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the terms of the batch."""
        return F.cross_entropy(self.logits(batch), self.targets(batch))

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Scores over all labels (those outside `choices` are masked by `judge`), or texts."""
        raise NotImplementedError

    def judge(self, batch: Batch, found: Predictions, choices: Choices) -> Tensor:
        """[batch]: how right each prediction is, from 0 to 1."""
        raise NotImplementedError

    def table(self, batch: Batch, found: Predictions, known: Predictions, choices: Choices) -> dict[str, Any]:
        """Columns of an evaluation, one value per example: `score`, `own_score` and what was answered."""
        raise NotImplementedError

    def summary(self, rows: dict[str, np.ndarray], own: bool = False) -> TaskScore:
        """One task's score from the columns of its examples; `own` is the task-incremental view."""
        scores = rows["own_score" if own else "score"]
        return TaskScore(100 * float(scores.mean()), float(scores.sum()), int(scores.size))

    def diagnostics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """More figures of one task, from the columns of its examples."""
        return {}

    def probe(self, answer: Callable[[Batch], Predictions]) -> dict[str, float]:
        """What else is asked of a model at every evaluation; `answer` predicts as the method does."""
        return {}

    def describe(self, pool: EncodedDataset, row: int) -> str:
        """What is expected of one example, for a person to read."""
        raise NotImplementedError

    def add_labels(self, labels: Sequence[int]) -> None:
        """Makes room for new labels; old ones keep their bits."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained beside the adapter, by name."""
        return {}

    def heads(self) -> dict[str, Any]:
        """Heads by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """Adapters, and what a subclass adds."""
        return {"adapters": self.adapters.state()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name, tensors in state["adapters"].items():
            self.adapters.load(name, tensors)


def longest_input(adapters: Adapters) -> int | None:
    """Tokens the backbone has positions for, less the virtual tokens of prompt tuning; None without a limit."""
    config: Any = adapters.model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    return positions - first_position(config) - (getattr(adapters.config, "num_virtual_tokens", 0) or 0)
