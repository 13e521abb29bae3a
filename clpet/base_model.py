"""M_0, the base model of a backbone with random weights: trained once on the benchmark's base corpus, then cached."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from clpet.config.identity import digest
from clpet.config.schema import EvaluationOptions, Schedule, Training
from clpet.data.benchmark import Benchmark
from clpet.data.token_cache import TokenCache, text_hash
from clpet.errors import HostError
from clpet.models.adapters import Adapters
from clpet.models.backbone import Backbone
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import SavedNetwork, Tokenizer
from clpet.objectives.language_modeling import LanguageModeling
from clpet.replay.base import NoReplay
from clpet.reporting.progress import Display
from clpet.runtime import atomic_io
from clpet.runtime.distributed import get_world
from clpet.runtime.hardware import Hardware
from clpet.training.step import StepHooks
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)


def prepare(
    backbone: Backbone, benchmark: Benchmark, hardware: Hardware, cache: Path | None, out: Path, display: Display
) -> Backbone:
    """The backbone with the weights of M_0 if its own are random and the benchmark has a base corpus.

    M_0 is trained if the cache does not have it; it does not depend on the seed of the run. Without a writable
    cache it is stored in the run directory `out`.
    """
    base = benchmark.base
    if not backbone.random_weights:
        return backbone
    if base is None:
        log.warning(
            "model %s has random weights and is not pretrained: the benchmark has no base corpus. Scores mean nothing",
            backbone.name,
        )
        return backbone
    tokens = TokenCache(backbone.tokenizer(), add_bos=benchmark.add_bos)
    inputs = [backbone.config, tokens.identity, text_hash(base.train), benchmark.max_length, benchmark.document_mask,
               str(hardware.torch_dtype)]  # fmt: skip
    name = digest([*inputs, vars(backbone.base)], 16)
    folder = (cache or out).expanduser() / "base" / name
    intact = atomic_io.is_intact(folder)
    if not (intact or atomic_io.is_writable(folder.parent)):
        log.warning("%s cannot be written; the base model is stored in %s", folder.parent, out)
        folder = out / "base" / name
        intact = atomic_io.is_intact(folder)
    if folder.exists() and not intact:
        log.warning("the base model in %s is damaged and is trained again", folder)
    if get_world().all_reduce_max(not intact)[0]:  # all ranks train, even if only one cannot read it
        display.task(0, f"base model on {base.name}")
        _train(backbone, benchmark, hardware, folder, display)
        display.close()
    return replace(backbone, path=str(folder), random_weights=False)


def _train(backbone: Backbone, benchmark: Benchmark, hardware: Hardware, folder: Path, display: Display) -> None:
    """Trains M_0 on the base corpus, as one task without replay, and writes it to `folder`."""
    assert benchmark.base is not None
    network = replace(backbone, dropout="auto")  # runs with different dropout share one M_0
    model, tokenizer = network.load(torch.float32, hardware.torch_device, 0, generates=True)
    adapters = Adapters(model, backbone, FullFineTuning(), generates=True)
    adapters.add("default", 0)
    keys = ("max_length", "document_mask", "length_set", "add_bos", "traits")
    base_benchmark = Benchmark("base", [benchmark.base], **{key: getattr(benchmark, key) for key in keys})
    cache, evaluation = str(folder.parent.parent), EvaluationOptions()
    objective = LanguageModeling("language_modeling")
    objective.setup(base_benchmark, backbone, adapters, tokenizer, 0, hardware, evaluation, cache)
    recipe, replay = backbone.base, NoReplay()
    replay.setup(objective.encode(), 0, recipe.batch_size)
    settings = Training(epochs=recipe.epochs, lr=recipe.lr, schedule=Schedule.cosine, warmup_steps=20, clip=1.0)
    trainer = Trainer(settings, hardware, objective, display, 0)
    trainer.begin_task(0)
    hooks = StepHooks(lambda context: objective.loss(context.batch))
    trainer.fit(replay.plan(0), adapters.tensors("default"), hooks)
    if get_world().is_main:
        _save(cast(SavedNetwork, model), tokenizer, folder)
    get_world().barrier()


def _save(model: SavedNetwork, tokenizer: Tokenizer, folder: Path) -> None:
    try:
        with atomic_io.cache_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise HostError(f"the base model {folder} cannot be written: {error.strerror or error}") from error
