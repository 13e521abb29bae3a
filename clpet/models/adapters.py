"""The options of the group `peft`, and named adapters on a backbone: add, activate, freeze, copy, save, load."""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clpet.config.schema import require
from clpet.errors import ModelError, suggest
from clpet.models.architectures import dropout_rates
from clpet.models.backbone import Architecture, Backbone
from clpet.models.block_expansion import expand
from clpet.models.protocols import NetworkClass, config_of
from clpet.records import ParameterRatio

TASK_TYPES = {
    Architecture.decoder: peft.TaskType.CAUSAL_LM,
    Architecture.encoder_decoder: peft.TaskType.SEQ_2_SEQ_LM,
}


@dataclass
class FullFineTuning:
    """peft=none, full fine-tuning: every weight of the backbone is trained. The base class of all other options."""

    name: str = "none"

    full: ClassVar[bool] = True  # weights of the backbone itself are trained; they are then kept in fp32

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig | None:
        """peft's configuration; None if weights of the backbone itself are trained."""
        return None

    def trained_module(self, model: nn.Module) -> nn.Module:
        """The part of the backbone that is trained if there is no peft config."""
        return model


@dataclass
class Blocks(FullFineTuning):
    """Block expansion: a copy after every `every`-th block; only the copies are trained (arXiv 2401.02415)."""

    name: str = "blocks"
    every: int = 4

    def __post_init__(self) -> None:
        require(self.every >= 1, "peft.every", self.every, "at least 1")

    def trained_module(self, model: nn.Module) -> nn.Module:
        return nn.ModuleList(expand(model, self.every))


@dataclass
class Lora(FullFineTuning):
    """LoRA: h = W x + (alpha / r) B A x, initialised with A Kaiming-uniform and B = 0 (Hu et al., 2021)."""

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
class Ia3(FullFineTuning):
    """IA3: learned rescaling of the outputs of the target layers (Liu et al., 2022)."""

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
class Osf(FullFineTuning):
    """OSF: trains only the directions of small singular values, orthogonal to the large ones (Nayak et al., 2025)."""

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
class Frozen(FullFineTuning):
    """peft=frozen: the backbone is not trained; the method adds and trains vectors of its own."""

    name: str = "frozen"

    full: ClassVar[bool] = False

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        return peft.PeftConfig(task_type="FEATURE_EXTRACTION")


@dataclass
class Prompt(FullFineTuning):
    """Virtual tokens before the text (Lester et al., 2021) or, as prefix, before the keys and values of all layers."""

    tokens: int = 20
    every_layer: bool = False

    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "peft.tokens", self.tokens, "at least 1")

    def peft_config(self, backbone: Backbone) -> peft.PeftConfig:
        kind = peft.PrefixTuningConfig if self.every_layer else peft.PromptTuningConfig
        return kind(num_virtual_tokens=self.tokens, task_type="FEATURE_EXTRACTION")


class Adapters:
    """The backbone with its named adapters. Without a peft config there is one: the backbone, or blocks of it."""

    def __init__(self, model: nn.Module, backbone: Backbone, option: FullFineTuning, generates: bool = False) -> None:
        self.config = option.peft_config(backbone)
        if self.config is not None and generates:
            self.config.task_type = TASK_TYPES.get(backbone.architecture, self.config.task_type)
        self.full, self.option, self.model = option.full, option.name, model
        self.names: list[str] = []
        self.branches: list[Callable[[], contextlib.AbstractContextManager[None]]] = []  # `off` of low-rank branches
        self.active: tuple[str, bool] | None = None
        self.training = False
        self.drops = backbone.drops(trained=self.config is None)
        self.base_parameters = pretrained_parameters(model, backbone)  # before block expansion adds to them
        model.requires_grad_(False)
        self.trained_ids = {id(value) for value in option.trained_module(model).parameters()}  # without a peft config

    def add(self, name: str, seed: int) -> None:
        """Adds an adapter initialised from `seed`, active and trainable. Raises ModelError if a target has no layer."""
        if not re.fullmatch(r"\w+", name):  # it becomes the name of a folder
            raise ModelError(f"invalid adapter name {name!r}: use letters, digits and _")
        torch.manual_seed(seed)
        if self.config is None:
            if self.names:
                raise ModelError(
                    f"peft={self.option} trains the backbone and cannot hold a second adapter: use peft=lora"
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
        """Removes all adapters; with `merge` they are first merged into the weights of the backbone."""
        self.model = self.model.merge_and_unload() if merge else self.model.unload()  # type: ignore[operator]
        self.names, self.active = [], None

    def merged(self) -> nn.Module:
        """The backbone with its adapter merged, in fp32: an increment is often smaller than one step of bf16."""
        self.model.float()
        if self.names and self.config is not None:
            self.remove(merge=True)
        return self.model

    def activate(self, name: str, train: bool = False) -> None:
        """Routes every forward pass through one adapter; its tensors get gradients only with `train`."""
        if self.config is not None:
            self.model.set_adapter(name)  # type: ignore[operator]
        for parameter in self.tensors(name).values():
            parameter.requires_grad_(train)
        self.active = (name, train)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Forward passes inside use one adapter, frozen; afterwards the previous one is active again."""
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
        """Forward passes inside use the pretrained backbone without adapters and low-rank branches."""
        with contextlib.ExitStack() as stack:
            for branches_off in self.branches:
                stack.enter_context(branches_off())
            if self.config is not None and self.names:
                stack.enter_context(self.model.disable_adapter())  # type: ignore[operator]
            yield

    def train_mode(self, on: bool) -> None:
        """Switches the dropout of the adapters, and that of the backbone's layers if model.dropout enables it."""
        self.training = on
        self.model.train(on and self.drops)
        if self.drops or not on:
            return
        # The network stays in eval mode; only peft's dropout layers and recomputing blocks switch.
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train()
            elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True  # the block's flag alone: it recomputes, but dropout inside stays off

    def dropout(self) -> dict[str, float]:
        """Dropout rates above 0 of the backbone's layers in training, by their name in its config."""
        rates = dropout_rates(self.model.config) if self.drops else {}
        return {key: rate for key, rate in rates.items() if rate}

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter by their name in the model, without the adapter's name in it."""
        named = dict(self.model.named_parameters())
        if self.config is None:
            return {key: value for key, value in named.items() if id(value) in self.trained_ids}
        return {key.replace(f".{name}", ""): value for key, value in named.items() if name in key.split(".")}

    def copy(self, source: str, target: str) -> None:
        """Copies the values of one adapter into another."""
        self.load(target, {key: value.detach() for key, value in self.tensors(source).items()})

    @torch.no_grad()
    def load(self, name: str, values: dict[str, Tensor]) -> None:
        """Sets an adapter's tensors in place; adds the adapter if it does not exist."""
        if name not in self.names:
            self.add(name, 0)
        for key, parameter in self.tensors(name).items():
            parameter.copy_(values[key])

    def load_saved(self, folder: Path) -> None:
        """Loads the weights of the whole model that `save` wrote; a no-op with adapters."""
        if self.config is None:
            saved = cast(NetworkClass, type(self.model)).from_pretrained(
                folder / "model", config=self.model.config, dtype=torch.float32, use_safetensors=True
            )
            self.load("default", dict(saved.named_parameters()))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every adapter by adapter name."""
        return {name: {k: v.detach() for k, v in self.tensors(name).items()} for name in self.names}

    def count(self, name: str) -> int:
        """Number of scalars in one adapter."""
        return sum(parameter.numel() for parameter in self.tensors(name).values())

    def save(self, folder: Path) -> None:
        """Writes every adapter for PeftModel.from_pretrained, or the whole model for from_pretrained."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.config is None:
            self.model.save_pretrained(folder / "model")  # type: ignore[operator]
            return
        for name in self.names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model.save_pretrained(folder, selected_adapters=[name])  # type: ignore[operator]
            if name == "default":
                # peft writes the adapter "default" to the folder itself; all adapters get a subfolder here.
                (folder / name).mkdir(exist_ok=True)
                for file in ("adapter_config.json", "adapter_model.safetensors"):
                    (folder / file).replace(folder / name / file)
            plain_config(folder / name / "adapter_config.json")
        (folder / "README.md").unlink(missing_ok=True)

    def wrong_target(self, error: str) -> str:
        """The message for targets that do not match the model; `error` is the library's message."""
        targets = list(getattr(self.config, "target_modules", None) or [])
        layers = {name.rpartition(".")[2] for name, module in self.model.named_modules() if hasattr(module, "weight")}
        missing = [target for target in targets if target.rpartition(".")[2] not in layers]
        if missing:
            return f"peft.targets names the layer {missing[0]}, which this model does not have{suggest('', layers)}"
        return f"peft={self.option} does not fit this model: {error.splitlines()[0]}"


def plain_config(path: Path) -> None:
    """Sorts the sets that peft writes in arbitrary order, so that equal adapters are equal files."""
    values = json.loads(path.read_text())
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[key] = sorted(value)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def pretrained_parameters(model: nn.Module, backbone: Backbone) -> int:
    """Number of scalars of the pretrained model as papers count them: with a decoder's output embedding."""
    count = sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in model.parameters())
    config = config_of(model)
    headless = getattr(model, "lm_head", None) is None
    if headless and backbone.architecture is Architecture.decoder and not config.tie_word_embeddings:
        count += config.vocab_size * config.hidden_size
    return count


def parameter_ratio(trainable: int, total: int) -> ParameterRatio:
    """Trainable and total parameters, their ratio in percent, and the inverse ratio."""
    total = max(total, trainable)  # full fine-tuning trains the backbone and the head
    return {
        "trainable": trainable,
        "total": total,
        "percent": 100 * trainable / total,
        "times_fewer": total / trainable if trainable else None,
    }
