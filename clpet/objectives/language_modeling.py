"""language_modeling: predict the tokens of plain text, with causal backbones or with masked ones.

perplexity = exp(sum of -log p(token | context) / predicted tokens), sums over all windows of a domain's test text.
For a masked backbone it is the pseudo-perplexity of the masked positions, which are the same at every checkpoint.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clpet.config.schema import CapUnit, EvaluationOptions
from clpet.data.batches import Batch, Encoded, EncodedDataset, WindowBatch, pad_id
from clpet.data.benchmark import SPLITS, Benchmark, Example
from clpet.data.packing import Masking, Windows, pack
from clpet.data.token_cache import Stream, TokenCache
from clpet.data.traits import PLAIN_TEXT, Traits
from clpet.errors import ConfigError, DataError, ModelError, need_package
from clpet.models.architectures import first_position, logit_cap
from clpet.models.backbone import Architecture, Backbone
from clpet.models.flops import Pass
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import Tokenizer, config_of, network_of
from clpet.objectives import chunked_cross_entropy
from clpet.objectives.base import AnswerSpace, Columns, Encode, Objective, Predictions, TaskScore
from clpet.objectives.document_attention import check_window, document_mask, document_positions
from clpet.objectives.key_term_rank import prompt_windows, rank_statistics, ranks
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.network import gathered

EVAL_LENGTH = 128  # hardware.eval_batch_size counts windows of this many tokens


@dataclass
class LanguageModeling(Objective):
    """The loss is the mean over all predicted tokens of a batch of windows."""

    traits: ClassVar[Traits] = PLAIN_TEXT
    evaluation_options: ClassVar[tuple[str, ...]] = ("stride", "bos", "rank_prompts")
    unrecorded: ClassVar[tuple[str, ...]] = ("score",)

    def finish_setup(self) -> None:
        if not self.causal:
            tasks = [replace(task, metric="pseudo_perplexity") for task in self.benchmark.tasks]
            self.benchmark = replace(self.benchmark, tasks=tasks)
        benchmark, backbone = self.benchmark, self.backbone
        self.rank_windows: Windows | None = None  # contexts of key terms (evaluation.rank_prompts)
        if self.tokenizer.mask_token_id is None and not self.causal:
            raise ModelError(f"model {backbone.name} has no mask token, so it cannot be trained as a masked one")
        if cap := logit_cap(config_of(self.adapters.model)):  # the chunked loss would leave the cap out
            raise ModelError(f"model {backbone.name} caps its logits ({cap}), which language_modeling does not support")
        if self.evaluation.rank_prompts and not self.causal:
            raise ConfigError(f"evaluation.rank_prompts needs a decoder, which model {backbone.name} is not")
        stride, length = self.evaluation.stride, benchmark.max_length
        if stride and stride > length:
            raise ConfigError(
                f"evaluation.stride={stride} would skip text: it must be at most benchmark.max_length={length}"
            )
        self._check_begin_tokens()
        if benchmark.document_mask:
            check_window(self.adapters.model, backbone.name, "benchmark.document_mask", length)
        if benchmark.document_mask and getattr(self.adapters.config, "num_virtual_tokens", None):
            raise ConfigError("benchmark.document_mask does not support virtual tokens: set peft=lora or peft=none")

    def _check_begin_tokens(self) -> None:
        benchmark, name = self.benchmark, self.backbone.name
        if self.evaluation.bos and (not self.causal or self.bos_id is None):
            raise ConfigError(f"evaluation.bos needs a decoder whose tokenizer has such a token: model {name} has none")
        if benchmark.add_bos and (not self.causal or self.tokenizer.bos_token_id is None):
            raise ConfigError(f"benchmark.add_bos needs a decoder with a BOS token: model {name} has none")
        if benchmark.add_bos and self.evaluation.bos:
            raise ConfigError("evaluation.bos and benchmark.add_bos would both add a BOS token in front: set only one")
        if self.evaluation.bos and benchmark.document_mask:
            raise ConfigError("evaluation.bos does not support benchmark.document_mask: several texts share a window")

    def check(self, backbone: Backbone, peft: FullFineTuning, evaluation: EvaluationOptions) -> None:
        super().check(backbone, peft, evaluation)
        if evaluation.rank_prompts:
            need_package("sklearn", "sklearn", "evaluation.rank_prompts")
        if backbone.architecture is Architecture.encoder_decoder:
            raise ConfigError(
                f"model {backbone.name} is an encoder-decoder: language_modeling needs a decoder or encoder"
            )

    def encoder(self, benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> Encode:
        """Not used: `encode` makes windows from entire domains."""

        def encode(examples: list[Example], labels: list[int], tasks: list[int]) -> EncodedDataset:
            raise NotImplementedError("plain text is encoded as windows")

        return encode

    # Windows

    def encode(self) -> Encoded:
        """Windows of all domains, in one pool per split."""
        benchmark, tokens = self.benchmark, TokenCache(self.tokenizer, self.cache_dir, self.benchmark.add_bos)
        pools = {split: self._pool(split) for split in SPLITS}
        for index, task in enumerate(benchmark.tasks):
            for split in SPLITS:
                if documents := task.split(split):
                    self._add(pools[split], index, task.name, split, tokens, documents)
        if benchmark.base is not None:  # for replay; it is not a task
            self._add(pools["train"], -1, benchmark.base.name, "train", tokens, benchmark.base.train)
        if self.evaluation.rank_prompts:
            pad, split = pad_id(self.tokenizer), self.evaluation.split.value
            self.rank_windows = prompt_windows(benchmark, self.tokenizer, self.evaluation.rank_prompts, pad, split)
        return Encoded(pools["train"], pools["validation"], pools["test"], benchmark.seed_key)

    def windows(self, texts: Sequence[str]) -> tuple[Windows, np.ndarray]:
        """Windows of texts that are read one by one, in full, as documents of a test split; the text of each window.

        Raises DataError for a text without a token to predict.
        """
        pool, tokens = self._pool("test"), TokenCache(self.tokenizer, None, self.benchmark.add_bos)
        numbers: list[int] = []
        for number, text in enumerate(texts):
            stream = tokens.stream([Example(text)], sized=False)
            name, length = f"text {number + 1}", self.benchmark.max_length
            pack(0, name, pool, stream, length, stride=self.evaluation.stride, split="test")
            numbers += [number] * (len(pool) - len(numbers))
        return pool, np.array(numbers, np.int64)

    def _pool(self, split: str) -> Windows:
        masking = None
        if not self.causal:
            special, size = np.array(self.tokenizer.all_special_ids), len(self.tokenizer)
            assert self.tokenizer.mask_token_id is not None  # checked in __init__
            masking = Masking(self.tokenizer.mask_token_id, special, size, seed=0, training=split == "train")
        bos_id = self.bos_id if self.evaluation.bos and split != "train" else None
        return Windows(pad_id(self.tokenizer), self.benchmark.document_mask, masking, bos_id)

    @property
    def bos_id(self) -> int | None:
        """The token that texts of this tokenizer begin with; None if it has none."""
        bos, cls = self.tokenizer.bos_token_id, self.tokenizer.cls_token_id
        return cls if bos is None else bos

    def _add(
        self, pool: Windows, index: int, name: str, split: str, tokens: TokenCache, documents: Sequence[Example]
    ) -> None:
        lazy = self.benchmark.stream and split == "train"
        stream = tokens.lazy_stream(documents) if lazy else tokens.stream(documents, sized=split != "train")
        needs = [key for key in ("document_mask", "add_bos") if getattr(self.benchmark, key)]
        if needs and len(stream.tokens) and not len(stream.starts):
            raise DataError(f"benchmark.{needs[0]} needs document boundaries, which the files of {name} do not have")
        cap = self.evaluation
        limit = None if split == "train" else capped(stream, cap.max_tokens, cap.cap_unit)
        stride = cap.stride if split != "train" else None
        pack(index, name, pool, stream, self.benchmark.max_length, limit, stride, split)

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        size = max(1, self.eval_batch_size * EVAL_LENGTH // self.benchmark.max_length)
        return pool.by_length(rows, size)

    # Training

    def states(self, batch: Batch) -> Tensor:
        """[terms, dim]: inputs of the output layer for each of `batch.target_ids`."""
        assert isinstance(batch, WindowBatch)
        with self.autocast, without_head(self.adapters.model) as model:
            options = {"use_cache": False} if self.causal else {}
            hidden = network_of(model)(**self.inputs(batch), **options).logits
        self.count(batch)
        hidden = hidden[:, -batch.input_ids.shape[1] :]  # without the prompt in front
        return hidden.flatten(0, 1)[batch.target_positions - int(self.causal)]

    def work(self, batch: Batch) -> Pass:
        return replace(super().work(batch), outputs=len(self.targets(batch)))

    def inputs(self, batch: Batch) -> Mapping[str, Tensor | None]:
        """With benchmark.document_mask also a mask that separates documents, and positions that restart in each."""
        inputs = dict(super().inputs(batch))
        assert isinstance(batch, WindowBatch)
        if batch.document_ids is None:
            return inputs
        inputs["attention_mask"] = document_mask(batch.document_ids, self.dtype, self.causal)
        positions = document_positions(batch.document_ids) + first_position(config_of(self.adapters.model))
        return {**inputs, "position_ids": positions}

    @property
    def head(self) -> nn.Module:
        """The backbone's output layer."""
        return network_of(self.adapters.model).get_output_embeddings()

    def logits(self, batch: Batch) -> Tensor:
        """[terms, vocabulary] fp32."""
        with self.autocast, gathered(self.adapters.model):
            logits: Tensor = self.head(self.states(batch))
            return logits.float()

    def targets(self, batch: Batch) -> Tensor:
        """[terms]: the tokens to predict."""
        assert isinstance(batch, WindowBatch)
        return batch.target_ids

    def loss(self, batch: Batch) -> Tensor:
        with gathered(self.adapters.model):
            return chunked_cross_entropy.mean_nll(self.states(batch), self.targets(batch), self.head)

    # Prediction and scores

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Sum of negative log-likelihoods and number of predicted tokens per window; for key terms ranks."""
        assert isinstance(batch, WindowBatch)
        if batch.pool is self.rank_windows:
            return Predictions(extras={"rank": ranks(self.logits(batch), self.targets(batch))})
        with self.autocast, gathered(self.adapters.model):
            nll = chunked_cross_entropy.token_nll(self.states(batch), self.targets(batch), self.head).double()
        # Sums are in double precision: a domain can have millions of tokens.
        row = batch.target_positions // batch.input_ids.shape[1]
        sums = nll.new_zeros(len(batch)).index_add_(0, row, nll)
        counts = nll.new_zeros(len(batch)).index_add_(0, row, torch.ones_like(nll))
        return Predictions(extras={"nll": sums, "tokens": counts})

    def score(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, task_aware: Predictions | None = None
    ) -> Columns:
        """The score is minus the mean negative log-likelihood, so that higher is better."""
        assert isinstance(batch.pool, Windows)
        return {
            "bytes": np.array([batch.pool.bytes(row) for row in batch.rows]),
            "own_nll": (task_aware or predictions).extras["nll"],
            "score": -predictions.extras["nll"] / predictions.extras["tokens"].clamp(min=1),
        }

    def aggregate(self, rows: dict[str, np.ndarray], task_incremental: bool = False) -> TaskScore:
        """Perplexity, with the sums that it is computed from: nll and predicted tokens."""
        nll, tokens = float(rows["own_nll" if task_incremental else "nll"].sum()), float(rows["tokens"].sum())
        return TaskScore(perplexity(nll, tokens), nll, tokens)

    def diagnostics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Bits per byte of one domain: comparable across tokenizers."""
        size = float(rows["bytes"].sum())
        return {"bits_per_byte": float(rows["nll"].sum()) / (math.log(2) * size)} if size and self.causal else {}

    def extra_evaluation(self, answer: Callable[[Batch], Predictions]) -> dict[str, float]:
        """Prediction ranks of the key terms of all domains (evaluation.rank_prompts)."""
        if self.rank_windows is None or not len(self.rank_windows):
            return {}
        batches = self.batches(self.rank_windows, np.arange(len(self.rank_windows)))
        windows = self.rank_windows
        values = get_world().map(lambda rows: answer(windows.batch(rows, self.device)).extras["rank"].cpu(), batches)
        names = [self.benchmark.names[task] for task in self.rank_windows.tasks[np.concatenate(batches)]]
        statistics = rank_statistics(torch.cat(values).tolist(), names)
        return {
            f"{kind}_rank{'' if name == 'all' else f'/{name}'}": value
            for name, of_domain in statistics.items()
            for kind, value in of_domain.items()
        }

    def describe(self, pool: EncodedDataset, row: int) -> str:
        return f"predicts {int(pool.weights[row])} of its {int(pool.lengths[row])} tokens"


def capped(stream: Stream, limit: int | None, unit: CapUnit) -> int | None:
    """Number of tokens of a stream within evaluation.max_tokens; None for all."""
    if limit is None or unit is CapUnit.tokens or not len(stream.sizes):
        return limit
    return int(np.searchsorted(np.cumsum(stream.sizes, dtype=np.float64), limit, side="right"))


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); the largest float on overflow."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return sys.float_info.max


@contextlib.contextmanager
def without_head(model: nn.Module) -> Iterator[nn.Module]:
    """Replaces the output layer by the identity: the model's `logits` are then the inputs of that layer."""
    head = network_of(model).get_output_embeddings()
    parent, name = next((p, n) for p in model.modules() for n, child in p.named_children() if child is head)
    setattr(parent, name, nn.Identity())
    try:
        yield model
    finally:
        setattr(parent, name, head)
