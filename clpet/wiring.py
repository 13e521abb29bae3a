"""Components: the objects of a configuration, checked against each other. Session: all that a run works with, wired."""

import contextlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from clpet import base_model
from clpet.config.build import build
from clpet.config.schema import ClassWeights, Config, Decode, Select, Split
from clpet.config.seeding import derive
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.data.sources.base import Source
from clpet.errors import ConfigError
from clpet.evaluation.data_inspection import inspect_data
from clpet.evaluation.probes import Probes, check_probes
from clpet.methods.base import Method
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.compilation import compile_blocks, use_liger
from clpet.models.memory_saving import enable_recomputation, sharded_units
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import Tokenizer
from clpet.objectives import load
from clpet.objectives.base import Objective
from clpet.records import DataRecord
from clpet.replay.base import NoReplay
from clpet.reporting.progress import Display
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Generation, Hardware, Kernels, Quantization
from clpet.runtime.sharding.network import Sharding
from clpet.runtime.signals import GracefulShutdown
from clpet.training.fit_checkpoint import FitCheckpointer
from clpet.training.optimizers import check_optimizer
from clpet.training.progress import NoProgress, Progress
from clpet.training.rehearsal import Rehearsal
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The objects of a configuration. No data and no weights are loaded yet; the method is not set up."""

    config: Config
    method: Method
    objective: Objective
    source: Source
    replay: NoReplay
    backbone: Backbone
    peft: FullFineTuning
    hardware: Hardware
    tracking: object  # `Tracking`, which is in a package above this one

    @classmethod
    def build(cls, config: Config) -> "Components":
        """Builds the objects and checks them against each other. Raises ConfigError before anything is loaded."""
        objective, source = load(config, config.cache_dir)
        components = cls(
            config,
            method=build(config.method, "method", cache_dir=config.cache_dir),
            objective=objective,
            source=source,
            replay=build(config.replay, "replay"),
            backbone=build(config.model, "model"),
            peft=build(config.peft, "peft"),
            hardware=build(config.hardware, "hardware"),
            tracking=build(config.tracking, "tracking"),
        )
        components._check()
        return components

    def _check(self) -> None:
        self.method.check(self.objective, self.replay.name, self.peft)
        self.objective.check(self.backbone, self.peft, self.config.evaluation)
        if self.config.train.class_weights is not ClassWeights.none:
            self._check_class_weights()
        self.source.check_backbone(self.backbone)
        check_probes(self.config.evaluation, self.method, self.objective, self.backbone, self.peft, self.hardware.shard)
        if self.hardware.generation is Generation.continuous:
            self._check_generation()
        self.hardware.check(self.peft, self.method)
        if self.hardware.padding_free:
            self._check_packing()
        check_optimizer(
            self.config.train, self.hardware.torch_device, self.hardware.shard and self.peft.traits.saves_model
        )
        self.replay.check(self.config.train.global_batch_size, self.objective.traits)

    def _check_packing(self) -> None:
        """Raises ConfigError where the examples of a row would not be read as if each were alone."""
        traits, option = self.peft.traits, "hardware.padding_free=true"
        if not self.objective.traits.packs or self.backbone.architecture is not Architecture.decoder:
            raise ConfigError(f"{option} is for decoders with objective=text_to_text: set it to false")
        if not traits.trains or traits.prepends or traits.prefixes:
            raise ConfigError(f"{option} does not support vectors in front of a text, as of peft={self.peft.name}")
        if not self.method.supports_recompute:
            raise ConfigError(
                f"{option} cannot be used with method={self.method.name}, whose branches are mixed differently for "
                "every example: set it to false"
            )
        if self.method.reads_activations:
            raise ConfigError(
                f"{option} cannot be used with method={self.method.name}, which reads what layers compute for every "
                "example: set it to false"
            )

    def _check_generation(self) -> None:
        """Raises ConfigError where examples that share a pass would not be answered as each by itself."""
        option, fix = "hardware.generation=continuous", "set hardware.generation=padded"
        writes = self.objective.traits.generates_text and self.config.evaluation.decode is Decode.generate
        if not writes or self.backbone.architecture is not Architecture.decoder:
            raise ConfigError(f"{option} is for answers that a decoder writes: {fix}")
        traits = self.peft.traits
        if traits.full or traits.prepends or traits.prefixes:
            raise ConfigError(f"{option} does not support peft={self.peft.name}: {fix}")
        for name, is_set in (("shard", self.hardware.shard), ("compile", self.hardware.compile)):
            if is_set:
                raise ConfigError(f"{option} does not support hardware.{name}=true: {fix}")
        if not self.method.mergeable:
            raise ConfigError(
                f"{option} cannot be used with method={self.method.name}, which does not answer every example with the "
                f"same weights: {fix}"
            )

    def _check_class_weights(self) -> None:
        if not self.objective.traits.has_labels:
            raise ConfigError(f"train.class_weights is for labels, which objective={self.objective.name} does not have")
        if not self.method.has_cross_entropy:
            raise ConfigError(
                "train.class_weights weights the terms of a cross-entropy, which "
                f"method={self.method.name} does not have"
            )

    def settle(self, benchmark: Benchmark, length_set: bool = False) -> Benchmark:
        """A copy of the benchmark as this method learns it: its softmax, and the positions that prompts occupy.

        With `length_set` max_length is the user's: a model with a smaller maximum raises an error instead of lowering
        it. Raises ConfigError if the method, the objective or the evaluation do not suit the tasks.
        """
        self.method.check_benchmark(benchmark)
        self.objective.check_benchmark(benchmark, self.config.evaluation)
        self._check_validation(benchmark)
        return replace(
            benchmark,
            per_task_softmax=self.source.per_task_softmax(self.method.mixes_tasks(self.replay.name)),
            reserved_positions=self.method.reserved_positions(benchmark),
            length_set=length_set,
        )

    def _check_validation(self, benchmark: Benchmark) -> None:
        """Raises ConfigError if validation examples are needed, for the best epoch or the matrix, but missing."""
        selects_best = self.method.uses_validation and self.config.train.select is Select.best
        on_validation = self.config.evaluation.split is Split.validation
        for task in benchmark.tasks:
            if (selects_best or on_validation) and not task.validation:
                option = "evaluation.split=validation" if on_validation else "train.select=best"
                remedy = "benchmark.validation_share splits some from the training data"
                raise ConfigError(f"{option}, but task {task.name} has no validation examples: {remedy}")
        if selects_best and on_validation:
            log.warning(
                "evaluation.split=validation and train.select=best use the same examples: scores are too optimistic"
            )

    def with_base_model(self, benchmark: Benchmark, cache: Path | None, out: Path, display: Display) -> "Components":
        """A copy whose backbone has the weights of M_0, if its own are random and the benchmark has a base corpus."""
        backbone = base_model.prepare(self.backbone, benchmark, self.hardware, cache, out, display)
        return replace(self, backbone=backbone)

    def load_objective(self, benchmark: Benchmark) -> Objective:
        """The objective with its network, adapters and tokenizer. Raises ModelError."""
        backbone, hardware, peft, config = self.backbone, self.hardware, self.peft, self.config
        model, tokenizer = self.load_network()
        if hardware.kernels is Kernels.liger:
            use_liger(model)
        adapters = Adapters(model, backbone, peft, self.objective.traits.needs_output_layer)
        if sharding := self.sharding:
            units = [model.get_submodule(name) for name in sharded_units(model, sharding.trained)]
            sharding.divide(model, units)
        if hardware.gradient_checkpointing:
            enable_recomputation(model, adapters.drops)
        if hardware.compile:
            compile_blocks(model)
        if backbone.dropout == "own" and not adapters.dropout():
            log.warning("model.dropout=own, but all dropout rates in the config of %s are 0", backbone.name)
        seed, settings = derive(config.seed, "head"), (config.evaluation, config.cache_dir, config.train.class_weights)
        objective = replace(self.objective)  # these components may become several sessions
        return objective.setup(benchmark, backbone, adapters, tokenizer, seed, hardware, *settings)

    def load_network(self) -> tuple[nn.Module, Tokenizer]:
        """The pretrained network without adapters, and its tokenizer. Raises ModelError."""
        hardware, generates = self.hardware, self.objective.traits.needs_output_layer
        dtype = torch.float32 if self.peft.traits.full else hardware.torch_dtype
        nf4 = hardware.quantization is Quantization.nf4
        return self.backbone.load(dtype, hardware.torch_device, self.config.seed, generates, self.sharding, nf4)

    def host(self) -> dict[str, str | int]:
        """The record of this machine, and of the attention that `auto` stands for on it."""
        return {**self.hardware.record(), "attention": self.backbone.attention_on(self.hardware.torch_device)}

    @property
    def sharding(self) -> Sharding | None:
        """How the backbone is divided among several ranks; None if it is not."""
        hardware = self.hardware
        if not hardware.shard or get_world().size == 1:
            return None
        traits, device = self.peft.traits, hardware.torch_device
        # transformers places shards on the accelerator of a machine that has one. Blocks are copied as a whole, and
        # peft adapts no layer of replicas that transformers has loaded.
        loads = torch.cuda.is_available() == (device.type == "cuda") and not traits.adds_blocks
        loads = loads and (traits.saves_model or hardware.replicas == 1)
        return Sharding(device, hardware.replicas, traits.saves_model, hardware.torch_dtype, loads)


@dataclass(frozen=True)
class Session:
    """What a run works with, complete: it can learn, predict and be evaluated.

    `benchmark` is as the objective uses it: with lengths that fit the model.
    """

    components: Components
    benchmark: Benchmark
    data: Encoded
    trainer: Trainer

    @classmethod
    def build(cls, config: Config) -> "Session":
        """The session of a configuration, without a run directory: nothing is shown and no checkpoint written."""
        components = Components.build(config)
        benchmark = components.settle(components.source.load(config.data_dir))
        cache = Path(config.cache_dir or ".cache")
        components = components.with_base_model(benchmark, cache, cache, Display(Console(quiet=True), 0))
        return cls.assemble(components, benchmark, NoProgress())

    @classmethod
    def assemble(
        cls,
        components: Components,
        benchmark: Benchmark,
        progress: Progress,
        shutdown: GracefulShutdown | None = None,
    ) -> "Session":
        """Loads the weights, tokenises the benchmark and sets up the method. Raises ModelError.

        The trainer reports to `progress`, and writes a checkpoint when `shutdown` has caught a signal.
        """
        config, method, replay = components.config, components.method, components.replay
        sharded = components.sharding is not None
        with contextlib.nullcontext() if sharded else get_world().main_first():  # all ranks load shards together
            objective = components.load_objective(benchmark)
        with get_world().main_first():  # the other ranks then find the tokenised text in the cache
            data = objective.encode()
        objective.micro_batches.check(data.train)
        replay.setup(data, config.seed, config.train.global_batch_size)  # before the method, which reads it
        method.setup(objective, objective.benchmark, data, replay, config.seed)
        checkpointer = FitCheckpointer(method, config.train.save_minutes, shutdown)
        kind = Rehearsal if config.dry_run else Trainer
        trainer = kind(config.train, components.hardware, objective, progress, config.seed, checkpointer)
        return cls(components, objective.benchmark, data, trainer)

    @property
    def config(self) -> Config:
        """The checked configuration."""
        return self.components.config

    @property
    def split(self) -> str:
        """The split that the matrix is measured on."""
        return self.config.evaluation.split.value

    @property
    def method(self) -> Method:
        """The method, set up."""
        return self.components.method

    @cached_property
    def data_record(self) -> DataRecord:
        """Statistics of the data and warnings about them, for the record."""
        return inspect_data(self.benchmark, self.data)

    @cached_property
    def probes(self) -> Probes:
        """Measures drift from the pretrained model."""
        pool = self.data.split(self.split)
        return Probes(self.config.evaluation, self.method, pool, lambda: self.components.load_network()[0])

    def learn(self, index: int, last: bool = False) -> None:
        """Learns task `index`; `last` says that no other follows."""
        task = self.benchmark.tasks[index]
        self.trainer.begin_task(index, last)
        earlier = [number for number, _ in self.method.curriculum() if number < index]
        self.method.objective.new_tasks = range(max(earlier, default=-1) + 1, index + 1)
        self.method.learn(task, index, self.trainer)
        self.method.after_task(task, index)
