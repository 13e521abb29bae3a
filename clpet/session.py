"""Benchmark, model, objective, method: built from the configuration and checked against each other."""

import logging
from typing import Any

import torch

from clpet.config.build import build
from clpet.config.schema import Config, Evaluation, Select, Split
from clpet.config.seeding import derive
from clpet.data.batches import Encoded
from clpet.data.benchmark import Benchmark
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.models.adapters import Adapters
from clpet.models.memory_saving import recompute
from clpet.objectives import load as load_objective_class
from clpet.objectives.base import Objective
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Quantization

log = logging.getLogger(__name__)

# Knobs of `evaluation` that one objective alone reads.
EVALUATIONS = {"decode": "text_to_text", "max_new_tokens": "text_to_text", "stride": "language_modeling",
               "bos": "language_modeling", "rank_prompts": "language_modeling"}  # fmt: skip


def assemble(config: Config) -> tuple[Method, dict[str, Any]]:
    """The method and the other parts, built and checked against each other before anything is loaded."""
    parts = {name: build(getattr(config, name), name) for name in ("replay", "model", "peft", "hardware", "tracking")}
    parts["benchmark"] = build(config.benchmark, "benchmark", cache_dir=config.cache_dir)
    method = build(config.method, "method", cache_dir=config.cache_dir)
    objective = parts["benchmark"].objective.value
    parts["benchmark"].settle(method.mixes_tasks(parts["replay"].name))
    method.check(objective, parts["replay"].name, parts["peft"].name)
    load_objective_class(objective).check(parts["model"], parts["peft"].name, config.evaluation)
    check_knobs(config, parts, objective)
    parts["hardware"].check(parts["peft"], method)
    parts["replay"].check(config.train.global_batch_size, objective)
    return method, parts


def check_knobs(config: Config, parts: dict[str, Any], objective: str) -> None:
    """Raises ConfigError for a knob that is turned and would change nothing."""
    usual = Evaluation()
    for knob, owner in EVALUATIONS.items():
        if objective != owner and getattr(config.evaluation, knob) != getattr(usual, knob):
            raise ConfigError(f"evaluation.{knob} is for {owner}; this benchmark's objective is {objective}")
    if objective != "classification" and parts["model"].head_dropout:
        raise ConfigError(f"model.head_dropout is for classification; this benchmark's objective is {objective}")


def check_validation(config: Config, method: Method, benchmark: Benchmark) -> None:
    """The best epoch, and settings, need something to be chosen on."""
    chosen = method.uses_validation and config.train.select is Select.best
    measured = config.evaluation.split is Split.validation
    for task in benchmark.tasks:
        if (chosen or measured) and not task.validation:
            what = "evaluation.split=validation" if measured else "train.select=best"
            remedy = "benchmark.validation_share cuts some from train"
            raise ConfigError(f"{what}, but task {task.name} has no validation examples: {remedy}")
    if chosen and measured:
        log.warning("evaluation.split=validation measures what train.select=best chooses by: figures are too good")


def load_objective(config: Config, parts: dict[str, Any], benchmark: Benchmark) -> tuple[Objective, Encoded]:
    """The backbone with its tokenizer, and the benchmark's splits tokenised once."""
    backbone, hardware, peft = parts["model"], parts["hardware"], parts["peft"]
    kind = load_objective_class(parts["benchmark"].objective.value)
    dtype = torch.float32 if peft.full else hardware.torch_dtype
    spread, nf4 = hardware.shard and get_world().size > 1, hardware.quantization is Quantization.nf4
    place = torch.device("cpu") if spread else hardware.torch_device
    model, tokenizer = backbone.load(dtype, hardware.torch_device, config.seed, kind.generates, place, nf4)
    adapters = Adapters(model, backbone, peft, kind.generates)
    if hardware.gradient_checkpointing:
        recompute(model, adapters.drops)
    if backbone.dropout == "own" and not adapters.dropout():
        log.warning("model.dropout=own, but all rates in the config of %s are 0: nothing is dropped", backbone.name)
    seed = derive(config.seed, "head")
    objective = kind(benchmark, backbone, adapters, tokenizer, seed, hardware, config.evaluation)
    objective.cache_dir = config.cache_dir
    return objective, objective.encode()
