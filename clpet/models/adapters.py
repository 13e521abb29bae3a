"""Named adapters on a backbone: add, activate, freeze, copy, save, load."""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from clpet.errors import ModelError, first_line, suggest
from clpet.models.adapter_precision import compute_in_input_dtype
from clpet.models.architectures import dropout_rates, matches
from clpet.models.backbone import Architecture, Backbone
from clpet.models.flops import Branches, NetworkFlops
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import NetworkClass, config_of
from clpet.records import ParameterRatio
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.files import write_model
from clpet.runtime.sharding.tensors import aligned

TASK_TYPES = {
    Architecture.decoder: peft.TaskType.CAUSAL_LM,
    Architecture.encoder_decoder: peft.TaskType.SEQ_2_SEQ_LM,
}


class Adapters:
    """The backbone with its named adapters. Without a peft config there is one: the backbone, or blocks of it."""

    def __init__(self, model: nn.Module, backbone: Backbone, option: FullFineTuning, generates: bool = False) -> None:
        self.config = option.peft_config(backbone, model)
        if self.config is not None and generates:
            self.config.task_type = TASK_TYPES.get(backbone.architecture, self.config.task_type)
        self.traits, self.option, self.model = option.traits, option.name, model
        self.names: list[str] = []
        self.branches: list[Branches] = []  # low-rank branches of methods
        self.active: tuple[str, bool] | None = None
        self.training = False
        self.drops = backbone.drops(trained=self.config is None)
        self.base_parameters = pretrained_parameters(model, backbone)  # before block expansion adds to them
        model.requires_grad_(False)
        ids = {id(value) for value in option.trained_module(model).parameters()}
        self.trained_names = {name for name, value in model.named_parameters() if id(value) in ids}  # without peft

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
        else:
            self._attach(name, self.config)
        self.names.append(name)
        self.activate(name, train=True)
        self.train_mode(self.training)

    def _attach(self, name: str, config: peft.PeftConfig) -> None:
        """Adds an adapter of peft. Raises ModelError with peft's reason if it does not fit the layers."""
        self._check_transposed(config)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.names:
                    self.model.add_adapter(name, config)  # type: ignore[operator]
                else:
                    self.model = peft.get_peft_model(self.model, config, adapter_name=name)
        except (ValueError, TypeError, NotImplementedError, AssertionError, ImportError) as error:
            raise ModelError(self.wrong_target(str(error) or type(error).__name__)) from error
        if self.traits.lora_factors:
            compute_in_input_dtype(self.model, name)

    def _check_transposed(self, config: peft.PeftConfig) -> None:
        """Raises ModelError if a target is a Conv1D, which peft's code for this option would misread or refuse."""
        targets = getattr(config, "target_modules", None) or []
        for layer, module in () if self.traits.transposed else self.model.named_modules():
            if isinstance(module, Conv1D) and any(matches(layer, target) for target in targets):
                raise ModelError(
                    f"peft={self.option} supports linear layers only, but peft.targets matches {layer}, a Conv1D "
                    "(GPT-2 stores its weights transposed): change peft.targets, or use peft=lora"
                )

    def remove(self, merge: bool) -> None:
        """Removes all adapters; with `merge` they are first merged into the weights of the backbone.

        Raises ModelError where peft cannot merge them.
        """
        try:
            self.model = self.model.merge_and_unload() if merge else self.model.unload()  # type: ignore[operator]
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"peft={self.option} cannot be merged: {first_line(error)}") from error
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
            for branches in self.branches:
                stack.enter_context(branches.off())
            if self.config is not None and self.names:
                stack.enter_context(self._without_adapters())
            yield

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """peft's disable_adapter; it fails for prompts in front of a network that cannot generate."""
        model = cast(peft.PeftModel, self.model)
        if not (self.traits.prepends or self.traits.prefixes) or hasattr(model, "prepare_inputs_for_generation"):
            with model.disable_adapter():
                yield
            return
        self.model = model.base_model
        try:
            yield
        finally:
            self.model = model

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside are without dropout."""
        training = self.training
        if training:
            self.train_mode(False)
        try:
            yield
        finally:
            if training:
                self.train_mode(True)

    def train_mode(self, on: bool) -> None:
        """Switches the dropout of the adapters, and that of the backbone's layers if model.dropout enables it."""
        self.training = on
        self.model.train(on and self.drops)
        if self.drops or not on:
            return
        # The network stays in eval mode; only what peft has added and recomputing blocks switch.
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                assert isinstance(module, nn.Module)  # what BaseTunerLayer is mixed into
                module.training = True  # the layer's flag alone: the layer that it wraps stays in eval mode
                for child_name, child in module.named_children():
                    child.train(child_name != "base_layer")
            elif name.startswith("prompt_encoder."):
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
            return {key: value for key, value in named.items() if key in self.trained_names}
        return {key.replace(f".{name}", ""): value for key, value in named.items() if name in key.split(".")}

    def flops(self, prompt: int = 0) -> NetworkFlops:
        """The operations of passes through the active adapter, with `prompt` vectors of the method before each text."""
        active = self.active[0] if self.active else None
        inactive = frozenset(name for name in self.names if name != active)
        virtual: int = getattr(self.config, "num_virtual_tokens", 0) or 0
        in_front = prompt + (virtual if self.names and self.traits.prepends else 0)
        learned_keys = bool(self.names) and self.traits.prefixes
        return NetworkFlops.of(self.model, inactive, self.branches, in_front, in_front > 0, learned_keys)

    def copy(self, source: str, target: str) -> None:
        """Copies the values of one adapter into another."""
        self.load(target, {key: value.detach() for key, value in self.tensors(source).items()})

    @torch.no_grad()
    def load(self, name: str, values: dict[str, Tensor]) -> None:
        """Sets an adapter's tensors in place; adds the adapter if it does not exist."""
        if name not in self.names:
            self.add(name, 0)
        for key, parameter in self.tensors(name).items():
            parameter.copy_(aligned(values[key], parameter))

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
        """Writes every adapter for PeftModel.from_pretrained, or the whole model for from_pretrained.

        All ranks must make this call if the weights are sharded; the main rank writes them.
        """
        if self.config is None and get_world().mesh is not None:
            if get_world().is_main:  # the main rank may write to a temporary folder that the others do not know
                (folder / "model").mkdir(parents=True, exist_ok=True)
            write_model(self.model, folder / "model")
            return
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
