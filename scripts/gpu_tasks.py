"""The parts of scripts/gpu_check.py on labelled texts: what methods add to a training step, and generated answers."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_parts import Part, Row, Stopwatch, plain_model, text, wire, with_lora, write_rows
from torch import Tensor, nn

from clpet.evaluation.evaluator import Evaluator
from clpet.training.progress import NoProgress

TASKS, LABELS = 3, 4
ALPHABET = "".join(map(chr, range(ord("A"), ord("A") + 60)))  # five letters for each of twelve labels
METHODS = ("sequential", "kif", "dynamic_conpet")
LORA = ["q_proj", "v_proj"]


def labelled_text(part: Part, label: int, rng: random.Random) -> str:
    """A random text in the letters of a label, so that a random network can learn the label, too."""
    return text(part.size.length - 2, rng, ALPHABET[5 * label : 5 * label + 5])  # 2: the tokenizer's special tokens


def labelled(part: Part, folder: Path) -> list[str]:
    """Writes three tasks of four labels; the words of a run on them."""
    size, rng = part.size, random.Random(0)
    for split, count in (("train", size.rows), ("validation", LABELS), ("test", LABELS)):
        rows = []
        for task in range(TASKS):
            for index in range(count):
                label = LABELS * task + index % LABELS
                rows.append({"task": f"task{task}", "label": f"{label:02}", "text": labelled_text(part, label, rng)})
        write_rows(folder / f"{split}.jsonl", rows)
    return [
        "benchmark=files", f"data_dir={folder}", "benchmark.task=task", f"benchmark.max_length={size.length}",
        f"train.global_batch_size={size.batch}", f"train.epochs={size.epochs}", f"train.lr={size.lr}",
        f"hardware.device={part.device.type}",
    ]  # fmt: skip


def steps(count: int, seconds: float) -> str:
    """Steps, and what one takes with all that happens between tasks."""
    return f"{count} steps, {1e3 * seconds / count:.0f} ms for each"


def clpet_method(part: Part, words: list[str]) -> Row:
    """Seconds of `Session.learn` for all tasks, after a first step; tokens are those of the new texts."""
    size, watch = part.size, Stopwatch(part)
    session = wire(words, size, watch)
    part.reset_peak()
    start, memory = part.synchronize(), 0.0
    for index in range(TASKS):
        session.learn(index)
        memory = max(memory, part.peak_gib() or 0.0)  # a task begins with a new peak
    seconds = part.synchronize() - start
    falls = [losses for number in range(len(watch.losses)) if (losses := watch.epoch_losses(number))]
    worst = max(falls, key=lambda losses: losses[-1] / losses[0])  # every fit has to learn
    row = part.row(seconds, TASKS * size.rows * size.length * size.epochs, worst)
    return replace(row, memory_gib=memory or None, note=steps(watch.steps, seconds))


def hand_classification(part: Part) -> Row:
    """The shortest loop: backbone, peft adapter, a linear layer on the last token; one task after the other."""
    from transformers import AutoModel

    size, device, rng = part.size, part.device, random.Random(0)
    body: Any = with_lora(plain_model(AutoModel, part, part.dtype), 8, LORA)
    head = nn.Linear(int(body.config.hidden_size), TASKS * LABELS, device=device)
    trained = [value for value in [*body.parameters(), *head.parameters()] if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=size.lr, weight_decay=0.01, fused=True)
    part.reset_peak()
    start = part.synchronize()
    losses: list[Tensor] = []
    for task in range(TASKS):
        labels = torch.arange(size.rows, device=device) % LABELS + LABELS * task
        texts = [labelled_text(part, LABELS * task + row % LABELS, rng).encode() for row in range(size.rows)]
        ids = torch.tensor([list(line) for line in texts], device=device)
        for _ in range(size.epochs):
            for batch in torch.randperm(size.rows, device=device).split(size.batch):
                with part.autocast():
                    states = body(input_ids=ids[batch], use_cache=False).last_hidden_state[:, -1]
                loss = F.cross_entropy(
                    head(states.float())[:, LABELS * task : LABELS * (task + 1)], labels[batch] - LABELS * task
                )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
    seconds = part.synchronize() - start
    means = torch.stack(losses).view(TASKS, size.epochs, -1).mean(2)
    worst = max(means.tolist(), key=lambda values: values[-1] / values[0])
    return replace(
        part.row(seconds, TASKS * size.rows * size.length * size.epochs, worst), note=steps(len(losses), seconds)
    )


def methods(part: Part, folder: Path) -> None:
    """Methods against plain fine-tuning, and that against a hand-written loop, which also warms the device up."""
    words = labelled(part, folder)
    part.measure("by hand", "by hand", lambda: hand_classification(part))
    for method in METHODS:
        against = "by hand" if method == METHODS[0] else METHODS[0]
        part.measure(method, against, lambda method=method: clpet_method(part, [*words, f"method={method}"]))


# Generation


def prompts(part: Part, folder: Path) -> list[str]:
    """Writes `rows` test prompts; the words of a run that answers them in `epochs` tokens each."""
    size, rng = part.size, random.Random(0)
    for split, count in (("train", 4), ("validation", 4), ("test", size.rows)):
        rows = [{"text": text(size.length - 8 - index % 17, rng), "label": text(8, rng)} for index in range(count)]
        write_rows(folder / f"{split}.jsonl", rows)
    return [
        "objective=text_to_text", "benchmark=files", f"data_dir={folder}", "method=sequential",
        f"benchmark.max_length={size.length}", f"evaluation.max_new_tokens={size.epochs}",
        f"hardware.eval_batch_size={size.batch}", f"hardware.device={part.device.type}",
    ]  # fmt: skip


def clpet_answers(part: Part, words: list[str]) -> Row:
    """`Evaluator` over the test split: generation, and the scores of the answers."""
    size = part.size
    session = wire(words, size, NoProgress())
    evaluator = Evaluator(session.benchmark, session.data)
    part.reset_peak()
    start = part.synchronize()
    evaluation = evaluator(session.method, 0, [0])
    seconds = part.synchronize() - start
    assert len(evaluation.rows["prediction"]) == size.rows
    return part.row(seconds, size.rows * size.epochs)


def hand_answers(part: Part) -> Row:
    """`generate` of transformers over the same prompts, sorted by length and padded on the left."""
    from transformers import AutoModelForCausalLM

    size, device = part.size, part.device
    model: Any = with_lora(plain_model(AutoModelForCausalLM, part, part.dtype), 8, LORA).eval()
    rng = random.Random(0)
    for _ in range(8):
        rng.random()
    texts = [text(size.length - 8 - index % 17, rng).encode() for index in range(size.rows)]
    texts.sort(key=len, reverse=True)
    part.reset_peak()
    start, answers = part.synchronize(), 0
    for first in range(0, size.rows, size.batch):
        batch = texts[first : first + size.batch]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(line)) + list(line) for line in batch], device=device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=size.epochs, do_sample=False
            )
        answers += len(output.cpu())
    seconds = part.synchronize() - start
    assert answers == size.rows
    return part.row(seconds, answers * size.epochs)


def generate(part: Part, folder: Path) -> None:
    """Answers of an untrained model with an adapter: the end token is as likely as any other, so almost all are full."""
    words = prompts(part, folder)
    part.measure("by hand", "by hand", lambda: hand_answers(part))
    part.measure("clpet", "by hand", lambda: clpet_answers(part, words))
    if part.device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        ours = [*words, "hardware.generation=continuous"]
        part.measure("clpet, continuous", "by hand", lambda: clpet_answers(part, ours))
