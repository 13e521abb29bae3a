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
from clpet.data.batches import Batch
from clpet.methods.components.importance import Importance, ParameterGroups, adaptive, fuse, norm, unflat
from clpet.methods.components.key_retrieval import KeyLearning, orthonormal
from clpet.models.stacked_lora import require_attention_outputs
from clpet.objectives.base import AnswerSpace
from clpet.training.step import StepContext


def kif(overrides: list[str], rounds: int) -> None:
    """Training steps of three equal models, batch by batch: plain, with the orthogonality term, also with importance."""
    contenders = []
    for strength, tracked in ((0, False), (0.1, False), (0.1, True)):
        bench = Bench(["method=kif", f"method.orth_strength={strength}", "train.clip=1", *overrides])
        method = bench.method()
        method.start_importance()
        optimizer = torch.optim.AdamW(method.parameters(), lr=bench.lr, fused=True)
        contenders.append((method, optimizer, method.after_step if tracked else lambda context: None))
    pool, device = method.data.train, method.objective.device
    batches = pool.shuffled(np.arange(len(pool)), bench.batch, np.random.default_rng(0))
    times: list[list[float]] = [[], [], []]
    for turn in range(rounds + 1):
        for step_index, rows in enumerate(batches):
            for which in np.roll([0, 1, 2], step_index):  # no model is always the first
                seconds = kif_step(*contenders[which], pool.batch(rows, device))
                if turn:
                    times[which].append(seconds)
    plain, orthogonal, tracked_times = (np.array(seconds) for seconds in times)
    print(f"{len(plain)} steps each of {bench.batch} examples, {torch.get_num_threads()} threads; medians over steps")
    print(f"plain step                {1e3 * np.median(plain):8.2f} ms")
    print(f"orthogonality on / off    {np.median(orthogonal / plain):8.3f}")
    print(f"importance on / off       {np.median(tracked_times / orthogonal):8.3f}")
    print(f"fusion of 1,152 units     {min(fusion_seconds() for _ in range(5)):8.3f} s")


def kif_step(
    method: Any, optimizer: torch.optim.Optimizer, after_step: Callable[[StepContext], None], batch: Batch
) -> float:
    """Seconds of one training step."""
    start, context = time.perf_counter(), StepContext.of(batch)
    method.loss(context).backward()
    term = method.step_loss(context)
    if term is not None:
        term.backward()
    nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimizer.step()
    after_step(context)
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
    """1,000 answers, in batches and with one `generate` call each; test examples repeat if there are fewer."""
    words = [word.replace("tasks=", "benchmark.tasks=", 1) if word.startswith("tasks=") else word for word in overrides]
    bench = Bench(["objective=text_to_text", "benchmark.max_target=8", *words])
    objective = bench.method().objective
    pool, model = objective.encode().test, objective.adapters.model
    rows = np.resize(np.arange(len(pool)), 1000)

    @torch.inference_mode()
    def batched() -> float:
        start = time.perf_counter()
        for indices in objective.batches(pool, rows):
            objective.predict(pool.batch(indices, objective.device), AnswerSpace([]))
        return time.perf_counter() - start

    @torch.inference_mode()
    def one_at_a_time(count: int = 100) -> float:
        start = time.perf_counter()
        for row in rows[:count]:
            ids = torch.from_numpy(pool.tokens(row)).long()[None].to(objective.device)
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                eos_token_id=objective.end, pad_token_id=objective.tokenizer.pad_token_id,
            )  # fmt: skip
            objective.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return (time.perf_counter() - start) * len(rows) / count

    times = [(batched(), one_at_a_time()) for _ in range(rounds + 1)][1:]
    ours, single = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{len(rows)} answers of at most 8 tokens, {torch.get_num_threads()} threads, median of {rounds} rounds")
    print(f"in batches of {objective.eval_batch_size:4}       {ours:8.2f} s")
    print(f"one at a time (from 100)  {single:8.2f} s    {single / ours:.1f} times")


def slm(overrides: list[str], rounds: int) -> None:
    """SLM with branches mixed per text against plain LoRA of equal rank, batch by batch; its stage 1 against steps."""
    bench = Bench(["method=slm", "method.rank=12", "method.groups=6", "method.keys=4", "method.top_k=4", *overrides])
    method = bench.method()
    targets = ",".join(require_attention_outputs(method.objective.adapters.model))
    plain = Bench(["method=sequential", "peft.r=48", "peft.alpha=48", f"peft.targets=[{targets}]", *overrides]).method()
    pool, device = method.data.train, method.objective.device
    queries = method.queries(pool, np.arange(len(pool)))
    add_tasks(method, queries.shape[2], 5)
    rows = pool.rows_of(4 % len(bench.benchmark))  # the newest task
    names = ("LoRA of rank 48", "own 4 keys", "4 of 20 keys", "LoRA of rank 48, step", "own 4 keys, step")
    batches = pool.shuffled(rows, bench.batch, np.random.default_rng(0))
    times = [
        np.array(seconds)
        for seconds in slm_times(method, plain, [pool.batch(rows, device) for rows in batches], rounds)
    ]
    print(f"{len(times[0])} batches of {bench.batch} texts, {torch.get_num_threads()} threads; medians over batches")
    for which, name in enumerate(names):
        base = times[3 if which > 2 else 0]
        print(
            f"{name:24} {1e3 * np.median(times[which]):8.2f} ms   {np.median(times[which] / base):6.3f} of plain LoRA"
        )
    stage = KeyLearning(epochs=1, min_steps=0)
    start = orthonormal(method.sizes.groups, method.sizes.keys, queries.shape[2], 0).to(device)
    keys = min(
        timed(lambda: stage.learn(queries, start, 0, lambda *_: None, dry_run=False)) for _ in range(rounds)
    ) / len(queries)
    backbone = np.median(times[4]) / bench.batch
    print(
        f"stage 1 {1e6 * keys:.1f} us a text, a training step {1e6 * backbone:.1f} us a text: {backbone / keys:.0f} times"
    )


def slm_times(method: Any, plain: Any, batches: list[Any], rounds: int) -> list[list[float]]:
    """Seconds of every batch, in the order of `names`: three forward passes, then two training steps."""
    times: list[list[float]] = [[] for _ in range(5)]
    for turn in range(rounds + 1):
        for index, batch in enumerate(batches):
            runs = [
                lambda batch=batch: plain.predict(batch, AnswerSpace([])),
                lambda batch=batch: mixed_forward(method, batch),
                lambda batch=batch: method.predict_retrieved(batch, AnswerSpace([])),
                lambda batch=batch: step(plain, batch),
                lambda batch=batch: step(method, batch),
            ]
            for which in np.roll(range(len(runs)), index):
                with torch.set_grad_enabled(bool(which > 2)):
                    seconds = timed(runs[which])
                if turn:
                    times[which].append(seconds)
    return times


def add_tasks(method: Any, width: int, tasks: int) -> None:
    """Gives the method the keys and branches of `tasks` tasks, with random keys."""
    while len(method.key_pool) < tasks:
        task = len(method.key_pool)
        method.key_pool.append(
            orthonormal(method.sizes.groups, method.sizes.keys, width, task).to(method.objective.device)
        )
        method.stack.add(derive(0, task), method.per_task)
        method.task_heads.grow(method.benchmark.task_labels(task % len(method.benchmark)), seen=False)


def mixed_forward(method: Any, batch: Any) -> None:
    """The forward pass of a training step, without the loss."""
    mixture = method.retrieve(method.similarities(batch, method.key_pool[-1:]))
    with method.stack.selected_branches(mixture.branches(method.sizes.keys)):
        method.task_heads.scores(method.objective.features(batch), None)


def step(method: Any, batch: Any) -> None:
    """Forward and backward pass of a training batch; gradients are discarded."""
    method.loss(StepContext.of(batch)).backward()
    for parameter in method.parameters():
        parameter.grad = None


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, until the device has finished."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
