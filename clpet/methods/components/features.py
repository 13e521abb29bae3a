"""Text features of the frozen backbone or a sentence encoder, which training never changes: the inputs of routers."""

from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from clpet.data.batches import Batch, Encoded, EncodedDataset, position_ids
from clpet.data.benchmark import SPLITS, Benchmark
from clpet.models.protocols import network_of
from clpet.models.sentence_encoder import Encoder


def vocabulary(model: nn.Module) -> Tensor:
    """[vocabulary size, dim]: the matrix of input embeddings."""
    network = network_of(model)
    return cast(Tensor, network.get_input_embeddings().weight)


@torch.no_grad()
def token_embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """[batch, length, dim] fp32: the input embeddings of a text, before any layer."""
    network = network_of(model)
    vectors: Tensor = network.get_input_embeddings()(batch.input_ids)
    return vectors.float()


@torch.no_grad()
def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """[batch, length, dim] fp32: the last hidden states; those of the encoder if the model has one."""
    network = network_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    trunk = network.get_encoder() if network.config.is_encoder_decoder else network.base_model
    # With left padding the first token is not at position 0 unless the positions are passed explicitly.
    extra = {"position_ids": position_ids(batch.attention_mask)} if batch.left else {}
    return trunk(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).last_hidden_state.float()


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """[batch, length, dim] -> [batch, dim]: the mean over positions where `mask` [batch, length] is 1."""
    return torch.einsum("bl,bld->bd", mask / mask.sum(1, keepdim=True), x)


def max_pool(x: Tensor, mask: Tensor) -> Tensor:
    """[batch, length, dim] -> [batch, dim]: the elementwise maximum over positions where `mask` is 1."""
    return x.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)


class Embeddings:
    """Sentence embeddings of a benchmark's texts by split and row; a task is encoded at the first use of its rows."""

    def __init__(self, encoder: Encoder, benchmark: Benchmark, data: Encoded) -> None:
        self.encoder, self.data = encoder, data
        self.texts = {split: [e.text for task in benchmark.tasks for e in task.split(split)] for split in SPLITS}
        self.tables = {split: torch.zeros(len(texts), encoder.dim) for split, texts in self.texts.items()}
        self.encoded = {split: np.zeros(len(texts), dtype=bool) for split, texts in self.texts.items()}

    def __call__(self, pool: EncodedDataset, rows: np.ndarray) -> Tensor:
        """[len(rows), dim]: embeddings of rows of one of the benchmark's pools, or of new texts."""
        if pool.texts is not None:
            return self.encoder.encode([pool.texts[row] for row in rows], pool.cached_on_disk)
        split = next(split for split in SPLITS if getattr(self.data, split) is pool)
        encoded = self.encoded[split]
        if not encoded[rows].all():
            for task in np.unique(pool.tasks[rows[~encoded[rows]]]).tolist():
                task_rows = pool.rows_of(task)
                self.tables[split][task_rows] = self.encoder.encode([self.texts[split][row] for row in task_rows])
                encoded[task_rows] = True
        return self.tables[split][torch.from_numpy(rows)]
