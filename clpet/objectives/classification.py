"""Classification: a linear head on a representation of the text, growing with the labels seen so far."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpet.adapters import Adapters
from clpet.backbones import Backbone, Representation, representation
from clpet.config import derive
from clpet.cost import Meter
from clpet.errors import ModelError
from clpet.tasks import Benchmark
from clpet.text import Batch, Template

MISSING = -100.0  # logit of a label that no selected module scores (ConPET, section 3.7)


class Head(nn.Module):
    """logits = W h + b over a growing list of labels; `labels` are global label ids, one per row.

    A row starts from U(-1/sqrt(d), 1/sqrt(d)) drawn from (seed, label name): its start depends neither on
    the order of the tasks nor on how many labels there will be. Growing copies old rows bit for bit.
    """

    def __init__(self, dim: int, names: Sequence[str], seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        start = torch.stack([_initial_row(dim, seed, name) for name in names]) if names else torch.empty(0, dim + 1)
        self.register_buffer("start", start.to(device))
        self.labels: list[int] = []
        self.weight = nn.Parameter(self.start[:0, :-1].clone())
        self.bias = nn.Parameter(self.start[:0, -1].clone())

    start: Tensor

    def grow(self, labels: Sequence[int]) -> None:
        """Adds rows for the label ids that have none; the old rows keep their bits."""
        new = [label for label in labels if label not in self.labels]
        if new:
            rows = self.start[new]
            self.weight = nn.Parameter(torch.cat([self.weight.detach(), rows[:, :-1]]))
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), rows[:, -1]]))
            self.labels += new

    def forward(self, h: Tensor) -> Tensor:
        """[batch, dim] -> [batch, rows], columns in the order of `labels`."""
        return F.linear(h, self.weight, self.bias)

    def columns(self, labels: Tensor) -> Tensor:
        """Columns of this head for label ids; every id must have a row."""
        lookup = torch.full((len(self.start),), -1, dtype=torch.long)
        lookup[self.labels] = torch.arange(len(self.labels))
        return lookup.to(labels.device, non_blocking=True)[labels]

    def scatter(self, h: Tensor) -> Tensor:
        """[batch, dim] -> [batch, all labels]; a label without a row is scored by the row it would start from."""
        logits = F.linear(h, self.start[:, :-1], self.start[:, -1])
        if self.labels:
            logits[:, self.labels] = self(h).to(logits.dtype)
        return logits

    def state(self) -> dict[str, Any]:
        """Rows and their labels."""
        return {"labels": list(self.labels), "weight": self.weight.detach(), "bias": self.bias.detach()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.labels = list(state["labels"])
        self.weight = nn.Parameter(state["weight"].to(self.start.device))
        self.bias = nn.Parameter(state["bias"].to(self.start.device))


def _initial_row(dim: int, seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive(seed, "head row", name))
    return (torch.rand(dim + 1, generator=generator) * 2 - 1) / dim**0.5


class Classification:
    """A backbone with adapters, its head, and the losses and predictions a method builds on."""

    name = "classification"

    def __init__(
        self, benchmark: Benchmark, backbone: Backbone, adapters: Adapters, tokenizer: Any, seed: int, hardware: Any
    ) -> None:
        self.benchmark, self.adapters, self.tokenizer, self.seed = benchmark, adapters, tokenizer, seed
        self.eval_batch_size = hardware.eval_batch_size
        self.device, self.dtype = hardware.torch_device, hardware.torch_dtype
        config: Any = adapters.model.config
        self.dim = int(config.hidden_size)
        self.representation = representation(backbone, benchmark.template)
        needs_mask = self.representation is Representation.mask
        self.template = Template(tokenizer, benchmark.template, text_length(benchmark, adapters), needs_mask)
        if len(tokenizer) > config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's embedding only {config.vocab_size}"
            )
        self.head = self.new_head(seed)
        self.meter = Meter()
        self.prompt: Callable[[Batch], Tensor] | None = None  # [batch, p, dim] put before the text's embeddings
        full = adapters.full and self.dtype is not torch.float32
        self.autocast = torch.autocast(self.device.type, dtype=self.dtype) if full else contextlib.nullcontext()

    def new_head(self, seed: int, names: Sequence[str] | None = None) -> Head:
        """An empty head over the benchmark's labels (or over other names, such as task names)."""
        return Head(self.dim, self.benchmark.labels if names is None else names, seed, self.device)

    def features(self, batch: Batch) -> Tensor:
        """[batch, dim] fp32: the last hidden state after the final norm, read at the representation's position."""
        self.meter.count(batch, torch.is_grad_enabled())
        with self.autocast:
            hidden = self.adapters.model(**self.inputs(batch)).last_hidden_state
        hidden = hidden[:, -batch.input_ids.shape[1] :]  # prompts stand in front
        return pool(hidden, batch, self.representation)

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

    def state(self) -> dict[str, Any]:
        """Adapters and head."""
        return {"adapters": self.adapters.state(), "head": self.head.state()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name, tensors in state["adapters"].items():
            self.adapters.load(name, tensors)
        self.head.load(state["head"])


def text_length(benchmark: Benchmark, adapters: Adapters) -> int:
    """Tokens a text may have: the benchmark's limit, or what a method's prompts leave of the model's positions."""
    longest = longest_input(adapters)
    if longest is None:
        return benchmark.max_length
    if benchmark.max_length > longest:
        raise ModelError(f"benchmark.max_length={benchmark.max_length}, but this model reads at most {longest} tokens")
    if benchmark.reserved >= longest:
        raise ModelError(f"prompts of {benchmark.reserved} vectors leave no room: this model reads {longest} tokens")
    return min(benchmark.max_length, longest - benchmark.reserved)


def longest_input(adapters: Adapters) -> int | None:
    """Tokens the backbone has positions for, less the virtual tokens of prompt tuning; None without a limit."""
    config: Any = adapters.model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return positions - offset - (getattr(adapters.config, "num_virtual_tokens", 0) or 0)


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
