"""Speed and memory of training on plain text; run by scripts/bench.py.

python scripts/bench.py pretraining [model=... benchmark=...]   Trainer.fit on packed windows, and a hand-written loop
python scripts/bench.py padding benchmark=... data_dir=FOLDER model=...   padding of real tasks, and speed without it
python scripts/bench.py chunks       peak memory of a step with a vocabulary of 50,257, with and without chunks
"""

import multiprocessing
import resource
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench import Bench, medians
from torch import nn

from clpet.data.packed_rows import pack_rows
from clpet.replay.batch_plan import BatchPlan
from clpet.training.progress import NoProgress
from clpet.training.step import StepHooks
from clpet.training.trainer import Trainer

STEPS = 24  # timed together


def pretraining(overrides: list[str], rounds: int) -> None:
    """Windows per second of clpet's training loop and of the shortest loop over the same windows."""
    bench = Bench(["benchmark=python_domains", "model=tiny_llama_s", "benchmark.base=null", *overrides])
    first = bench.method()
    pool = first.data.train
    batches = pool.shuffled(np.arange(len(pool)), bench.batch, np.random.default_rng(0))[:STEPS]

    def ours() -> float:
        method = bench.method()
        trainer = Trainer(bench.config.train, bench.components.hardware, method.objective, NoProgress(), 0)
        plan = BatchPlan(method.data.train, len(batches), lambda epoch: batches)
        start = time.perf_counter()
        trainer.fit(plan, method.named_parameters(), StepHooks(method.loss, step_loss=method.step_loss))
        return sum(map(len, batches)) / (time.perf_counter() - start)

    def by_hand() -> float:
        objective = bench.method().objective
        model: Any = objective.adapters.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=bench.lr, weight_decay=0.0, fused=True)
        rows = [
            torch.from_numpy(np.stack([pool.tokens(row) for row in indices]).astype(np.int64)) for indices in batches
        ]
        model.train()
        start = time.perf_counter()
        for ids in rows:
            with objective.autocast:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return len(rows) * len(rows[0]) / (time.perf_counter() - start)

    print(
        f"{STEPS} steps of {bench.batch} windows of {bench.benchmark.max_length} tokens, {torch.get_num_threads()} threads"
    )
    speeds = medians("packed windows/s", {"clpet": ours, "by hand": by_hand}, rounds)
    print(f"packed training: clpet / by hand: {speeds['clpet'] / speeds['by hand']:.3f}")


def chunks(overrides: list[str], rounds: int) -> None:
    """Memory that one training step needs in addition to the model; each measured in a separate process."""
    memory = {name: step_memory(name == "in chunks") for name in ("whole", "in chunks")}
    for name, value in memory.items():
        print(f"one step, 4 windows of 1,024 tokens, vocabulary 50,257, logits {name}: {value:.0f} MB")
    print(f"in chunks / whole: {memory['in chunks'] / memory['whole']:.3f}")


def step_memory(chunked: bool) -> float:
    """MB by which the peak memory of a new process rises in one forward and backward pass."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_one_step, (chunked,))


def _one_step(chunked: bool) -> float:
    from transformers import GPT2Config, GPT2LMHeadModel

    from clpet.objectives.chunked_cross_entropy import mean_nll
    from clpet.objectives.language_modeling import without_head

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=256, n_head=4, n_positions=1024)).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a training run has them in any case
    ids = torch.randint(50257, (4, 1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if chunked:
        with without_head(model) as body:
            states = body(input_ids=ids, use_cache=False).logits
        loss = mean_nll(states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), model.lm_head)
    else:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def padding(overrides: list[str], rounds: int) -> None:
    """Places over tokens of the training batches of real tasks, padded and packed, and the speed of both."""
    words = ["objective=text_to_text", *overrides]
    ways = {
        name: Bench([*words, f"hardware.padding_free={on}"]) for name, on in (("padded", "false"), ("packed", "true"))
    }
    pool = ways["packed"].method().data.train
    shares: dict[str, list[float]] = {name: [] for name in ways}
    batches: list[np.ndarray] = []
    for task in np.unique(pool.tasks):
        own = pool.shuffled(pool.rows_of(task), ways["packed"].batch, np.random.default_rng(0))
        tokens = sum(int((pool.lengths[rows] - 1).sum()) for rows in own)
        padded = sum(pool.padded_tokens(rows) - len(rows) for rows in own)
        packed = sum(pack_rows(pool, rows, torch.device("cpu")).input_ids.numel() for rows in own)
        for name, places in (("padded", padded), ("packed", packed)):
            shares[name].append(places / tokens)
        batches += own[:STEPS]
    for name, values in shares.items():
        print(
            f"places / tokens, {name}: median of {len(values)} tasks {statistics.median(values):.3f}, largest {max(values):.3f}"
        )

    def speed(bench: Bench) -> float:
        method = bench.method()
        trainer = Trainer(bench.config.train, bench.components.hardware, method.objective, NoProgress(), 0)
        plan = BatchPlan(method.data.train, STEPS, lambda epoch: batches[:STEPS])
        start = time.perf_counter()
        trainer.fit(plan, method.named_parameters(), StepHooks(method.loss, step_loss=method.step_loss))
        return sum(map(len, batches[:STEPS])) / (time.perf_counter() - start)

    speeds = medians("examples/s", {name: lambda bench=bench: speed(bench) for name, bench in ways.items()}, rounds)
    print(f"packed / padded: {speeds['packed'] / speeds['padded']:.3f}")
