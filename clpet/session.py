"""Builds benchmark, model, objective and method from the configuration, and checks that they are compatible."""

import logging
from typing import TypedDict

import torch

from clpet.config.build import build
from clpet.config.schema import Config, EvaluationOptions, Select, Split
from clpet.config.seeding import derive
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.data.sources.base import Source
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.models.adapters import Adapters, FullFineTuning
from clpet.models.backbone import Backbone
from clpet.models.memory_saving import enable_recomputation
from clpet.objectives import load as load_objective_class
from clpet.objectives.base import Objective
from clpet.replay.base import NoReplay
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware, Quantization
from clpet.training.optimizers import check_optimizer

log = logging.getLogger(__name__)

# Options of `evaluation` that only one objective uses.
OPTION_OBJECTIVES = {"decode": "text_to_text", "max_new_tokens": "text_to_text", "stride": "language_modeling",
               "bos": "language_modeling", "rank_prompts": "language_modeling"}  # fmt: skip


class Parts(TypedDict):
    """The objects of a configuration, apart from the method, by config group."""

    replay: NoReplay
    model: Backbone
    peft: FullFineTuning
    hardware: Hardware
    tracking: object  # `Tracking`, which is in a package above this one
    benchmark: Source


def assemble(config: Config) -> tuple[Method, Parts]:
    """The method, and {group: object} of the other groups, all checked against each other before anything is loaded."""
    parts: Parts = {
        "replay": build(config.replay, "replay"),
        "model": build(config.model, "model"),
        "peft": build(config.peft, "peft"),
        "hardware": build(config.hardware, "hardware"),
        "tracking": build(config.tracking, "tracking"),
        "benchmark": build(config.benchmark, "benchmark", cache_dir=config.cache_dir),
    }
    method: Method = build(config.method, "method", cache_dir=config.cache_dir)
    objective = parts["benchmark"].objective.value
    parts["benchmark"].resolve_softmax(method.mixes_tasks(parts["replay"].name))
    method.check(objective, parts["replay"].name, parts["peft"].name)
    load_objective_class(objective).check(parts["model"], parts["peft"].name, config.evaluation)
    check_unused_options(config, parts, objective)
    parts["hardware"].check(parts["peft"], method)
    check_optimizer(config.train, parts["hardware"].torch_device)
    parts["replay"].check(config.train.global_batch_size, objective)
    return method, parts


def check_unused_options(config: Config, parts: Parts, objective: str) -> None:
    """Raises ConfigError for an option set to a non-default value that has no effect with this objective."""
    defaults = EvaluationOptions()
    for option, user in OPTION_OBJECTIVES.items():
        if objective != user and getattr(config.evaluation, option) != getattr(defaults, option):
            raise ConfigError(f"evaluation.{option} is for {user}; this benchmark's objective is {objective}")
    if objective != "classification" and parts["model"].head_dropout:
        raise ConfigError(f"model.head_dropout is for classification; this benchmark's objective is {objective}")


def check_validation(config: Config, method: Method, benchmark: Benchmark) -> None:
    """Raises ConfigError if validation examples are needed, to choose the best epoch or for the matrix, but missing."""
    selects_best = method.uses_validation and config.train.select is Select.best
    on_validation = config.evaluation.split is Split.validation
    for task in benchmark.tasks:
        if (selects_best or on_validation) and not task.validation:
            option = "evaluation.split=validation" if on_validation else "train.select=best"
            remedy = "benchmark.validation_share splits some from the training data"
            raise ConfigError(f"{option}, but task {task.name} has no validation examples: {remedy}")
    if selects_best and on_validation:
        log.warning(
            "evaluation.split=validation and train.select=best use the same examples: scores are too optimistic"
        )


def load_objective(config: Config, parts: Parts, benchmark: Benchmark) -> tuple[Objective, Encoded]:
    """The objective with its backbone, tokenizer and adapters, and the tokenised splits of the benchmark."""
    backbone, hardware, peft = parts["model"], parts["hardware"], parts["peft"]
    kind = load_objective_class(parts["benchmark"].objective.value)
    dtype = torch.float32 if peft.full else hardware.torch_dtype
    sharded, nf4 = hardware.shard and get_world().size > 1, hardware.quantization is Quantization.nf4
    # A sharded backbone is loaded on the host: it may not fit on one GPU.
    load_device = torch.device("cpu") if sharded else hardware.torch_device
    model, tokenizer = backbone.load(dtype, hardware.torch_device, config.seed, kind.generates, load_device, nf4)
    adapters = Adapters(model, backbone, peft, kind.generates)
    if hardware.gradient_checkpointing:
        enable_recomputation(model, adapters.drops)
    if backbone.dropout == "own" and not adapters.dropout():
        log.warning("model.dropout=own, but all dropout rates in the config of %s are 0", backbone.name)
    seed = derive(config.seed, "head")
    objective = kind(benchmark, backbone, adapters, tokenizer, seed, hardware, config.evaluation)
    objective.cache_dir = config.cache_dir
    return objective, objective.encode()


def set_up_method(
    config: Config,
    method: Method,
    parts: Parts,
    objective: Objective,
    benchmark: Benchmark,
    data: Encoded,
) -> None:
    """Gives the replay memory and the method what they work with; the replay memory first, since methods read it."""
    parts["replay"].setup(data, config.seed, config.train.global_batch_size)
    method.setup(objective, benchmark, data, parts["replay"], config.seed)
