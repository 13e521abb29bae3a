"""Benchmarks of single methods and objectives, run by scripts/bench.py NAME."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench import Bench
from torch import nn

from clpet.config.seeding import derive
from clpet.methods.components.importance import Importance, ParameterGroups, adaptive, fuse, norm, unflat
from clpet.methods.components.key_retrieval import KeyLearning, orthonormal
from clpet.models.stacked_lora import attention_outputs
from clpet.objectives.base import Choices


def kif(overrides: list[str], rounds: int) -> None:
    """Steps of three equal models in turn, batch by batch: plain, with the orthogonality term, with importance too."""
    contenders = []
    for strength, tracked in ((0, False), (0.1, False), (0.1, True)):
        bench = Bench(["method=kif", f"method.orth_strength={strength}", "train.clip=1", *overrides])
        method = bench.method()
        method.start_importance()
        optimizer = torch.optim.AdamW(method.parameters(), lr=bench.lr, fused=True)
        contenders.append((method, optimizer, method.after_step if tracked else lambda: None))
    pool, device = method.data.train, method.objective.device
    every = pool.shuffled(np.arange(len(pool)), bench.batch, np.random.default_rng(0))
    times: list[list[float]] = [[], [], []]
    for turn in range(rounds + 1):
        for place, rows in enumerate(every):
            for which in np.roll([0, 1, 2], place):
                seconds = kif_step(*contenders[which], pool.batch(rows, device))
                if turn:
                    times[which].append(seconds)
    plain, orthogonal, tracked_times = (np.array(found) for found in times)
    print(f"{len(plain)} steps each of {bench.batch} examples, {torch.get_num_threads()} threads; medians over steps")
    print(f"plain step                {1e3 * np.median(plain):8.2f} ms")
    print(f"orthogonality on / off    {np.median(orthogonal / plain):8.3f}")
    print(f"importance on / off       {np.median(tracked_times / orthogonal):8.3f}")
    print(f"fusion of 1,152 units     {min(fusion_seconds() for _ in range(5)):8.3f} s")


def kif_step(method: Any, optimizer: torch.optim.Optimizer, after_step: Callable[[], None], batch: Any) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    method.loss(batch).backward()
    nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimizer.step()
    after_step()
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fusion_seconds() -> float:
    """Seconds of unit scores and fusion for LoRA of rank 8 on q and v of T5-large."""
    tensors = {}
    for module in range(144):
        tensors |= {f"{module}.lora_A.weight": torch.rand(8, 1024), f"{module}.lora_B.weight": torch.rand(1024, 8)}
    importance = Importance(sum(value.numel() for value in tensors.values()), "mix", 0.85, 0.85, False)
    importance.update(list(tensors.values()), list(tensors.values()))
    units = ParameterGroups(tensors, by_rank=True)
    start = time.perf_counter()
    scores = norm(units.scores(unflat(importance.elements(), tensors)))
    for name, weight in units.broadcast(adaptive(scores.flip(0), scores, 0.25)).items():
        tensors[name].copy_(fuse(tensors[name].clone(), tensors[name], weight))
    return time.perf_counter() - start


def generate(overrides: list[str], rounds: int) -> None:
    """1,000 answers (with repeats where there are fewer test examples): in batches, and one `generate` call each."""
    kept = [word.replace("tasks=", "benchmark.tasks=", 1) if word.startswith("tasks=") else word for word in overrides]
    bench = Bench(["benchmark.objective=text_to_text", "benchmark.max_target=8", *kept])
    objective = bench.method().objective
    pool, model = objective.encode().test, objective.adapters.model
    rows = np.resize(np.arange(len(pool)), 1000)

    @torch.inference_mode()
    def batched() -> float:
        start = time.perf_counter()
        for part in objective.batches(pool, rows):
            objective.predict(pool.batch(part, objective.device), Choices([]))
        return time.perf_counter() - start

    @torch.inference_mode()
    def one_at_a_time(count: int = 100) -> float:
        start = time.perf_counter()
        for row in rows[:count]:
            ids = torch.from_numpy(pool.tokens(row)).long()[None].to(objective.device)
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                eos_token_id=objective.end, pad_token_id=objective.tokenizer.pad_token_id,
            )  # fmt: skip
            objective.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return (time.perf_counter() - start) * len(rows) / count

    times = [(batched(), one_at_a_time()) for _ in range(rounds + 1)][1:]
    ours, alone = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{len(rows)} answers of at most 8 tokens, {torch.get_num_threads()} threads, median of {rounds} rounds")
    print(f"in batches of {objective.eval_batch_size:4}       {ours:8.2f} s")
    print(f"one at a time (from 100)  {alone:8.2f} s    {alone / ours:.1f} times")


def slm(overrides: list[str], rounds: int) -> None:
    """Forward passes mixed per text against a plain LoRA of the same columns, batch by batch; stage 1 against steps."""
    bench = Bench(["method=slm", "method.rank=12", "method.groups=6", "method.keys=4", "method.top_k=4", *overrides])
    method = bench.method()
    targets = ",".join(attention_outputs(method.objective.adapters.model))
    plain = Bench(["method=sequential", "peft.r=48", "peft.alpha=48", f"peft.targets=[{targets}]", *overrides]).method()
    pool, device = method.data.train, method.objective.device
    queries = method.queries(pool, np.arange(len(pool)))
    trained(method, queries.shape[2], 5)
    rows = pool.rows_of(4 % len(bench.benchmark))  # those of the newest task
    every = pool.shuffled(rows, bench.batch, np.random.default_rng(0))
    names = ("LoRA of rank 48", "own 4 keys", "4 of 20 keys", "LoRA of rank 48, step", "own 4 keys, step")
    times: list[list[float]] = [[] for _ in names]
    for turn in range(rounds + 1):
        for place, rows in enumerate(every):
            batch = pool.batch(rows, device)
            runs = [
                lambda batch=batch: plain.predict(batch, Choices([])),
                lambda batch=batch: mixed_forward(method, batch),
                lambda batch=batch: method.predict_retrieved(batch, Choices([])),
                lambda batch=batch: step(plain, batch),
                lambda batch=batch: step(method, batch),
            ]
            for which in np.roll(range(len(runs)), place):
                with torch.set_grad_enabled(bool(which > 2)):
                    seconds = timed(runs[which])
                if turn:
                    times[which].append(seconds)
    found = [np.array(part) for part in times]
    print(f"{len(found[0])} batches of {bench.batch} texts, {torch.get_num_threads()} threads; medians over batches")
    for which, name in enumerate(names):
        base = found[3 if which > 2 else 0]
        print(
            f"{name:24} {1e3 * np.median(found[which]):8.2f} ms   {np.median(found[which] / base):6.3f} of plain LoRA"
        )
    stage = KeyLearning(epochs=1, min_steps=0)
    start = orthonormal(method.sizes.groups, method.sizes.keys, queries.shape[2], 0).to(device)
    keys = min(
        timed(lambda: stage.learn(queries, start, 0, lambda *_: None, trial=False)) for _ in range(rounds)
    ) / len(queries)
    backbone = np.median(found[4]) / bench.batch
    print(
        f"stage 1 {1e6 * keys:.1f} us a text, a training step {1e6 * backbone:.1f} us a text: {backbone / keys:.0f} times"
    )


def trained(method: Any, width: int, tasks: int) -> None:
    """As after `tasks` tasks, with keys at random."""
    while len(method.key_pool) < tasks:
        task = len(method.key_pool)
        method.key_pool.append(
            orthonormal(method.sizes.groups, method.sizes.keys, width, task).to(method.objective.device)
        )
        method.increments.add(derive(0, task), method.per_task)
        method.task_heads.grow(method.benchmark.task_labels(task % len(method.benchmark)), seen=False)


def mixed_forward(method: Any, batch: Any) -> None:
    """What a training step computes before backward, without the loss."""
    mixture = method.retrieve(method.similarities(batch, method.key_pool[-1:]))
    with method.increments.mixed(mixture.branches(method.sizes.keys)):
        method.task_heads.scores(method.objective.features(batch), None)


def step(method: Any, batch: Any) -> None:
    """Forward and backward of a training batch; gradients are dropped."""
    method.loss(batch).backward()
    for parameter in method.parameters():
        parameter.grad = None


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, until the device is done."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
