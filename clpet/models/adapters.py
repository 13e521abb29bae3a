"""Thin verbs over peft: add, activate, freeze, copy, save and load adapters by name."""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clpet.config.schema import require
from clpet.errors import ModelError, suggest
from clpet.models.backbone import Architecture, Backbone, dropout_rates
from clpet.models.block_expansion import expand
from clpet.records import ParameterRatio

TASK_TYPES = {
    Architecture.decoder: peft.TaskType.CAUSAL_LM,
    Architecture.encoder_decoder: peft.TaskType.SEQ_2_SEQ_LM,
}


@dataclass
class Adapter:
    """A peft group option. This one means full fine-tuning: every weight of the backbone is trained."""

    name: str = "none"

    full: ClassVar[bool] = True  # the backbone's own weights are moved, and held in fp32

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig | None:
        """What peft needs to know, or None where the backbone's own weights are trained."""
        return None

    def chosen(self, model: nn.Module) -> nn.Module:
        """The part of the backbone that is trained, where there is no peft config."""
        return model


@dataclass
class Blocks(Adapter):
    """Copies of every `every`-th block, put behind it; they alone are trained (Wu et al., 2024, arXiv 2401.02415)."""

    name: str = "blocks"
    every: int = 4

    def __post_init__(self) -> None:
        require(self.every >= 1, "peft.every", self.every, "at least 1")

    def chosen(self, model: nn.Module) -> nn.Module:
        return nn.ModuleList(expand(model, self.every))


@dataclass
class Lora(Adapter):
    """Low-rank increments: h = W x + (alpha / r) B A x with A Kaiming-uniform and B = 0 (Hu et al., 2021)."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] | None = None

    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.r >= 1, "peft.r", self.r, "at least 1")
        require(0 <= self.dropout < 1, "peft.dropout", self.dropout, "in [0, 1)")

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.targets or backbone.targets),
            task_type="FEATURE_EXTRACTION",
        )


@dataclass
class Ia3(Adapter):
    """Learned rescaling of the outputs of chosen layers (Liu et al., 2022)."""

    targets: list[str] | None = None
    feedforward: list[str] = field(default_factory=list)

    full: ClassVar[bool] = False

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        return peft.IA3Config(
            target_modules=list(self.targets or backbone.targets) + list(self.feedforward),
            feedforward_modules=list(self.feedforward),
            task_type="FEATURE_EXTRACTION",
        )


@dataclass
class Osf(Adapter):
    """Training only in the singular directions of small weight, orthogonal to the others (Nayak et al., 2025)."""

    effective_rank: float = 0.5
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require(0 < self.effective_rank < 1, "peft.effective_rank", self.effective_rank, "between 0 and 1")

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        return peft.OSFConfig(
            effective_rank=self.effective_rank,
            target_modules=list(self.targets or backbone.targets),
            task_type="FEATURE_EXTRACTION",
        )


@dataclass
class Frozen(Adapter):
    """The backbone stays as it is: the method trains vectors of its own."""

    name: str = "frozen"

    full: ClassVar[bool] = False

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        return peft.PeftConfig(task_type="FEATURE_EXTRACTION")


@dataclass
class Prompt(Adapter):
    """Virtual tokens before the text (Lester et al., 2021), or before every layer's keys and values (`prefix`)."""

    tokens: int = 20
    every_layer: bool = False

    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "peft.tokens", self.tokens, "at least 1")

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        kind = peft.PrefixTuningConfig if self.every_layer else peft.PromptTuningConfig
        return kind(num_virtual_tokens=self.tokens, task_type="FEATURE_EXTRACTION")


class Adapters:
    """The backbone with its named adapters. Without a peft config: one, the backbone or blocks of it."""

    def __init__(self, model: nn.Module, backbone: Backbone, adapter: Adapter, generates: bool = False) -> None:
        self.config = adapter.peft_config(backbone)
        if self.config is not None and generates:
            self.config.task_type = TASK_TYPES.get(backbone.architecture, self.config.task_type)
        self.full, self.kind, self.model = adapter.full, adapter.name, model
        self.names: list[str] = []
        self.active: tuple[str, bool] | None = None
        self.training = False
        self.drops = backbone.drops(trained=self.config is None)
        self.base_parameters = pretrained_parameters(model, backbone)
        model.requires_grad_(False)
        self.chosen = {id(value) for value in adapter.chosen(model).parameters()}  # by full fine-tuning, or blocks

    def add(self, name: str, seed: int) -> None:
        """A fresh adapter, initialised from `seed`, active and trainable. Raises ModelError for a wrong target."""
        if not re.fullmatch(r"\w+", name):  # it becomes a folder
            raise ModelError(f"{name!r} is no name of an adapter")
        torch.manual_seed(seed)
        if self.config is None:
            if self.names:
                raise ModelError(
                    f"peft={self.kind} trains the backbone and cannot hold a second adapter: use peft=lora"
                )
        elif not self.names:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.model = peft.get_peft_model(self.model, self.config, adapter_name=name)
            except ValueError as error:
                raise ModelError(self.wrong_target(str(error))) from error
        else:
            self.model.add_adapter(name, self.config)  # type: ignore[operator]
        self.names.append(name)
        self.activate(name, train=True)
        self.train_mode(self.training)

    def remove(self, merge: bool) -> None:
        """The backbone without adapters, with what they learned merged into its weights or dropped."""
        self.model = self.model.merge_and_unload() if merge else self.model.unload()  # type: ignore[operator]
        self.names, self.active = [], None

    def merged(self) -> Any:
        """The backbone with what its adapter learned in its weights; in fp32, as a step of bf16 is often more."""
        self.model.float()
        if self.names and self.config is not None:
            self.remove(merge=True)
        return self.model

    def activate(self, name: str, train: bool = False) -> None:
        """Routes every forward through one adapter; its tensors get gradients only when `train`."""
        if self.config is not None:
            self.model.set_adapter(name)  # type: ignore[operator]
        for parameter in self.tensors(name).values():
            parameter.requires_grad_(train)
        self.active = (name, train)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Forwards inside go through one frozen adapter; afterwards the one that was active is so again."""
        before, training = self.active, self.training
        if before == (name, False) and not training:
            yield
            return
        self.activate(name)
        self.train_mode(False)
        try:
            yield
        finally:
            if before is not None:
                self.activate(*before)
            self.train_mode(training)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The backbone as it was before any adapter."""
        if self.config is None or not self.names:
            yield
        else:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield

    def train_mode(self, on: bool) -> None:
        """Switches the dropout of adapters, and that of the backbone's own layers where model.dropout has them drop."""
        self.training = on
        self.model.train(on and self.drops)
        if self.drops or not on:
            return
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train()
            elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True  # it alone: the layers inside of it do not drop

    def dropout(self) -> dict[str, float]:
        """Rates above 0 at which the backbone's own layers drop in training, by their name in its config."""
        rates = dropout_rates(self.model.config) if self.drops else {}
        return {key: rate for key, rate in rates.items() if rate}

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter, by their name in the model without the adapter's own name."""
        named = dict(self.model.named_parameters())
        if self.config is None:
            return {key: value for key, value in named.items() if id(value) in self.chosen}
        return {key.replace(f".{name}", ""): value for key, value in named.items() if name in key.split(".")}

    def copy(self, source: str, target: str) -> None:
        """Gives one adapter the values of another."""
        self.load(target, {key: value.detach() for key, value in self.tensors(source).items()})

    @torch.no_grad()
    def load(self, name: str, values: dict[str, Tensor]) -> None:
        """Sets an adapter's tensors in place; adds the adapter if it is not there."""
        if name not in self.names:
            self.add(name, 0)
        for key, parameter in self.tensors(name).items():
            parameter.copy_(values[key])

    def load_saved(self, folder: Path) -> None:
        """Sets the whole model's weights to those that `save` wrote; with adapters there is nothing to do."""
        if self.config is None:
            model: Any = self.model
            saved = type(model).from_pretrained(
                folder / "model", config=model.config, dtype=torch.float32, use_safetensors=True
            )
            self.load("default", dict(saved.named_parameters()))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Every adapter's tensors by adapter name."""
        return {name: {k: v.detach() for k, v in self.tensors(name).items()} for name in self.names}

    def count(self, name: str) -> int:
        """Number of scalars in one adapter."""
        return sum(parameter.numel() for parameter in self.tensors(name).values())

    def save(self, folder: Path) -> None:
        """Writes every adapter in peft's format, readable by PeftModel.from_pretrained; full weights as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.config is None:
            self.model.save_pretrained(folder / "model")  # type: ignore[operator]
            return
        for name in self.names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model.save_pretrained(folder, selected_adapters=[name])  # type: ignore[operator]
            if name == "default":
                (folder / name).mkdir(exist_ok=True)
                for file in ("adapter_config.json", "adapter_model.safetensors"):
                    (folder / file).replace(folder / name / file)
            plain_config(folder / name / "adapter_config.json")
        (folder / "README.md").unlink(missing_ok=True)

    def wrong_target(self, error: str) -> str:
        """What to tell a person whose targets do not fit the model."""
        targets = list(getattr(self.config, "target_modules", None) or [])
        layers = {name.rpartition(".")[2] for name, module in self.model.named_modules() if hasattr(module, "weight")}
        missing = [target for target in targets if target.rpartition(".")[2] not in layers]
        if missing:
            return f"peft.targets names the layer {missing[0]}, which the model does not have{suggest('', layers)}"
        return f"peft={self.kind} does not fit this model: {error.splitlines()[0]}"


def plain_config(path: Path) -> None:
    """Sorts the sets that peft writes in arbitrary order, so that equal adapters are equal files."""
    values = json.loads(path.read_text())
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[key] = sorted(value)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def pretrained_parameters(model: nn.Module, backbone: Backbone) -> int:
    """Scalars of the pretrained model as papers count them: a decoder's output embedding belongs to it."""
    count = sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in model.parameters())
    config: Any = model.config
    headless = getattr(model, "lm_head", None) is None
    if headless and backbone.architecture is Architecture.decoder and not config.tie_word_embeddings:
        count += config.vocab_size * config.hidden_size
    return count


def parameter_ratio(trainable: int, total: int) -> ParameterRatio:
    """Trainable and total parameters, the share in percent and the inverse ratio (how many times fewer)."""
    total = max(total, trainable)  # full fine-tuning trains the head on top of all of the backbone
    return {
        "trainable": trainable,
        "total": total,
        "percent": 100 * trainable / total,
        "times_fewer": total / trainable if trainable else None,
    }
