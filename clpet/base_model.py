"""M_0 for a backbone with random weights: trained on the benchmark's base corpus once, and kept as a model folder."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clpet.config.identity import digest
from clpet.config.schema import Evaluation, Schedule, Training
from clpet.data.benchmark import Benchmark
from clpet.data.token_cache import TokenCache, text_hash
from clpet.errors import HostError
from clpet.models.adapters import Adapter, Adapters
from clpet.models.backbone import Backbone
from clpet.objectives.language_modeling import LanguageModeling
from clpet.replay.base import NoReplay
from clpet.reporting.progress import Display
from clpet.runtime import atomic_io
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)


def prepare(
    backbone: Backbone, benchmark: Benchmark, hardware: Hardware, cache: Path | None, out: Path, display: Display
) -> None:
    """Points a backbone with random weights at M_0, where the benchmark has text to make it on.

    It is trained first where no earlier run has; nothing depends on the run's seed. Without a cache, or one that
    can be written, it lies in the run directory `out`.
    """
    base = benchmark.base
    if not backbone.random_weights:
        return
    if base is None:
        log.warning("model %s starts from random weights: there is no base corpus to make it on", backbone.name)
        return
    tokens = TokenCache(backbone.tokenizer(), begin=benchmark.begin)
    made_of = [backbone.config, tokens.identity, text_hash(base.train), benchmark.max_length, benchmark.isolate,
               str(hardware.torch_dtype)]  # fmt: skip
    name = digest([*made_of, vars(backbone.base)], 16)
    folder = (cache or out).expanduser() / "base" / name
    found = atomic_io.is_intact(folder)
    if not (found or atomic_io.is_writable(folder.parent)):
        log.warning("%s cannot be written, the base model is made in %s", folder.parent, out)
        folder = out / "base" / name
        found = atomic_io.is_intact(folder)
    if folder.exists() and not found:
        log.warning("the base model in %s is damaged and is made again", folder)
    if get_world().all_reduce_max(not found)[0]:
        display.task(0, f"base model on {base.name}")
        _train(backbone, benchmark, hardware, folder, display)
        display.close()
    backbone.path, backbone.random_weights = str(folder), False


def _train(backbone: Backbone, benchmark: Benchmark, hardware: Hardware, folder: Path, display: Display) -> None:
    assert benchmark.base is not None
    network = replace(backbone, dropout="auto")  # what a run drops is no part of what all runs begin with
    model, tokenizer = network.load(torch.float32, hardware.torch_device, 0, generates=True)
    adapters = Adapters(model, backbone, Adapter(), generates=True)
    adapters.add("default", 0)
    alone = Benchmark("base", [benchmark.base], max_length=benchmark.max_length, isolate=benchmark.isolate)
    alone.length_set, alone.begin = benchmark.length_set, benchmark.begin
    objective = LanguageModeling(alone, backbone, adapters, tokenizer, 0, hardware, Evaluation())
    objective.cache_dir = str(folder.parent.parent)
    how, plan = backbone.base, NoReplay()
    plan.setup(objective.encode(), 0, how.batch_size)
    settings = Training(epochs=how.epochs, lr=how.lr, schedule=Schedule.cosine, warmup_steps=20, clip=1.0)
    trainer = Trainer(settings, hardware, objective, display, 0)
    trainer.begin_task(0)
    trainer.fit(plan.plan(0), objective.loss, adapters.tensors("default"))
    if get_world().is_main:
        _save(model, tokenizer, folder)
    get_world().barrier()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    try:
        with atomic_io.cache_folder(folder) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    except OSError as error:
        raise HostError(f"the base model {folder} cannot be written: {error.strerror or error}") from error
