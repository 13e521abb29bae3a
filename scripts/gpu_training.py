"""The parts of scripts/gpu_check.py on plain text: LoRA on an 8B model, and full fine-tuning of a 1.7B one."""

import importlib.util
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_parts import Part, Row, Stopwatch, flops_per_token, plain_model, text, wire, with_lora, write_rows
from torch import Tensor, nn

from clpet.errors import HostError

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
RECOMPUTE = "hardware.gradient_checkpointing=true"
COMPILE = "hardware.compile=true"


def domain_words(part: Part, folder: Path) -> list[str]:
    """Writes `rows` windows of text; the words of a run that reads them."""
    size, rng = part.size, random.Random(0)
    write_rows(folder / "random" / "train.jsonl", [{"text": text(size.rows * size.length, rng)}])
    for split in ("validation", "test"):
        write_rows(folder / "random" / f"{split}.jsonl", [{"text": text(size.length, rng)}])
    return [
        "benchmark=text_domains", f"data_dir={folder}", f"benchmark.max_length={size.length}",
        "benchmark.decontaminate=false", "method=sequential", f"train.global_batch_size={size.batch}",
        f"train.epochs={size.epochs}", f"train.lr={size.lr}", "train.warmup_steps=0", f"hardware.device={part.device.type}",
    ]  # fmt: skip


def clpet_pretraining(part: Part, words: list[str], rank: int | None, recompute: bool) -> Row:
    """`Session.learn` of one domain."""
    watch, size = Stopwatch(part), part.size
    session = wire([*words, *[RECOMPUTE] * recompute], size, watch)
    session.learn(0)
    assert len(session.data.train) == size.rows, len(session.data.train)
    tokens = (watch.steps - size.warmup) * size.batch * size.length
    flops = flops_per_token(size.config, size.length, rank)
    return part.row(watch.end - watch.start, tokens, watch.epoch_losses(), flops)


def hand_pretraining(part: Part, compiled: bool, rank: int | None, recompute: bool) -> Row:
    """The shortest loop of PyTorch, transformers and peft over the same text."""
    from transformers import AutoModelForCausalLM

    size, device = part.size, part.device
    model: Any = plain_model(AutoModelForCausalLM, part, part.dtype if rank else torch.float32)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.model.layers
    if rank:
        model = with_lora(model, rank, PROJECTIONS)
    for layer in layers if compiled else ():
        layer.compile()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=size.lr, weight_decay=0.0, fused=True)
    ids = torch.tensor(list(text(size.rows * size.length, random.Random(0)).encode()), device=device)
    batches = ids.view(-1, size.batch, size.length)
    model.train()
    losses: list[Tensor] = []
    part.reset_peak()
    for step in range(size.epochs * len(batches)):
        if step == size.warmup:
            start = part.synchronize()
        batch = batches[step % len(batches)]
        with part.autocast():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = part.synchronize() - start
    by_epoch = torch.stack(losses).view(size.epochs, -1).mean(1).tolist()
    tokens = (len(losses) - size.warmup) * size.batch * size.length
    return part.row(seconds, tokens, by_epoch, flops_per_token(size.config, size.length, rank))


def lora(part: Part, folder: Path) -> None:
    """LoRA on all projections."""
    words = [*domain_words(part, folder), "peft=lora", f"peft.r={RANK}", f"peft.alpha={2 * RANK}"]
    compare(part, [*words, f"peft.targets=[{','.join(PROJECTIONS)}]"], RANK)


def full(part: Part, folder: Path) -> None:
    """All weights, in fp32 with products in bf16."""
    compare(part, [*domain_words(part, folder), "peft=none"], None)


def compare(part: Part, words: list[str], rank: int | None) -> None:
    """clpet and a hand-written loop, eager and compiled, and clpet with Liger's kernels where they are installed."""
    for name, compiled in (("eager", False), ("compiled", True)):
        hand = f"by hand, {name}"
        if compiled and not compiles(part):
            continue
        part.measure(hand, hand, lambda compiled=compiled: fitting(part, compiled, hand_pretraining, rank))
        ours = [*words, *[COMPILE] * compiled]
        part.measure(f"clpet, {name}", hand, lambda ours=ours: fitting(part, ours, clpet_pretraining, rank))
    if part.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        ours = [*words, "hardware.kernels=liger"]
        part.measure("clpet, liger", "by hand, eager", lambda: fitting(part, ours, clpet_pretraining, rank))


def compiles(part: Part) -> bool:
    """Whether torch.compile has the compiler that it needs for the device."""
    return bool(importlib.util.find_spec("triton") if part.device.type == "cuda" else shutil.which("g++"))


def fitting(part: Part, way: object, run: Callable[..., Row], rank: int | None) -> Row:
    """Runs a contender with stored activations, or with recomputed ones if memory is too small for those."""
    try:
        return run(part, way, rank, False)
    except (torch.OutOfMemoryError, HostError) as error:
        if "out of memory" not in str(error).lower():
            raise
    part.free()  # outside the except block: the traceback of the error keeps tensors
    return replace(run(part, way, rank, True), note="activations recomputed: stored ones do not fit")
