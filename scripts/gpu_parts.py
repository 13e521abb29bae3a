"""The measurements of scripts/gpu_check.py: clpet and hand-written loops on the same data, one after the other.

clpet runs through its own `Components`, `Session`, `Trainer` and `Evaluator`, as in `clpet train`; only the random
weights are made on the device instead of the host, which would take minutes for 8B.
"""

import gc
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clpet.api.words import compose, overrides
from clpet.config.build import parse_config
from clpet.models.backbone import Architecture, Backbone
from clpet.training.progress import NoProgress
from clpet.wiring import Components, Session

SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, **SPECIAL}
LLAMA_8B = {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 14336, "tie_word_embeddings": False}  # fmt: skip
LLAMA_1B = {**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "intermediate_size": 8192, "tie_word_embeddings": True}  # fmt: skip
QWEN_1_7B = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144,
             "max_position_embeddings": 8192, "tie_word_embeddings": True, **SPECIAL}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128, "max_position_embeddings": 256}  # fmt: skip
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # bf16, dense
PUBLISHED_LORA = {"tokens_per_s": 12473.0, "tflops": 402.0}  # the best public figure for an 8B LLaMA on one H100


@dataclass(frozen=True)
class Size:
    """What a part trains: `rows` texts of `length` tokens, `epochs` times, in batches of `batch`."""

    config: dict[str, object]
    length: int
    batch: int
    rows: int
    epochs: int
    lr: float
    warmup: int = 3  # steps before the clock starts


SIZES = {
    "lora": Size(LLAMA_8B, length=4096, batch=1, rows=8, epochs=3, lr=1e-3, warmup=4),
    "full": Size(QWEN_1_7B, length=2048, batch=2, rows=16, epochs=3, lr=1e-4),
    "methods": Size(LLAMA_1B, length=256, batch=16, rows=128, epochs=3, lr=1e-3),
    "generate": Size(LLAMA_1B, length=128, batch=128, rows=2000, epochs=64, lr=0.0),  # epochs: new tokens
}
TINY_SIZES = {
    name: replace(
        size,
        config=size.config | TINY,
        length=64,
        batch=min(size.batch, 4),
        rows=8,
        epochs=8 if name == "generate" else 3,
        lr=1e-2,
    )
    for name, size in SIZES.items()
}


@dataclass
class Row:
    """One measurement. Losses are means over the first and the last pass over the data, memory is the peak in GiB.

    `against` is the contender it is compared with.
    """

    part: str
    contender: str
    against: str
    seconds: float
    tokens: int
    flops_per_token: float | None = None
    memory_gib: float | None = None
    losses: tuple[float, float] | None = None
    note: str = ""


@dataclass
class Part:
    """What a part works with. Records are appended to `out` as they come, so that none is lost with the process."""

    name: str
    size: Size
    device: torch.device
    deadline: float  # by time.time()
    out: Path
    longest: float = 0.0  # seconds of the slowest contender so far

    @property
    def dtype(self) -> torch.dtype:
        """The precision of frozen weights and of products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def record(self, **values: object) -> None:
        """Writes one record."""
        with self.out.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def measure(self, contender: str, against: str, run: Callable[[], Row]) -> None:
        """Runs a contender, unless the time left is below that of the slowest so far."""
        if self.longest and time.time() + self.longest > self.deadline:
            self.record(left_out=contender)
            return
        started = time.perf_counter()
        self.record(row=asdict(replace(run(), contender=contender, against=against)))
        self.longest = max(self.longest, time.perf_counter() - started)
        self.free()

    def free(self) -> None:
        """Gives the memory of the last contender back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> float:
        """The time, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        """Peak memory counts from now on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """GiB that tensors have occupied at most since the last reset."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

    def autocast(self) -> torch.autocast:
        """Products in bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def row(self, seconds: float, tokens: int, losses: list[float] | None = None, flops: float | None = None) -> Row:
        """The figures of a contender that has passed `tokens` tokens through the network."""
        ends = (losses[0], losses[-1]) if losses else None
        return Row(self.name, "", "", seconds, tokens, flops, self.peak_gib(), ends)


class Stopwatch(NoProgress):
    """Times the steps of all fits after the warm-up; keeps the mean loss of every epoch, on the device."""

    def __init__(self, part: Part) -> None:
        self.part, self.steps, self.start, self.end = part, 0, 0.0, 0.0
        self.losses: list[dict[int, Tensor]] = []  # of each fit, by epoch

    def fit(self, stage: str, epochs: int, steps: int) -> None:
        self.total, self.done = epochs * steps, 0
        self.losses.append({})

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        self.losses[-1][epoch] = loss
        self.steps, self.done = self.steps + 1, self.done + 1
        if self.steps == self.part.size.warmup:
            self.start = self.part.synchronize()
        if self.done == self.total:
            self.end = self.part.synchronize()

    def epoch_losses(self, fit: int = 0) -> list[float]:
        """The mean losses of a fit's epochs."""
        return [loss.item() for loss in self.losses[fit].values()]


class OnDevice(Backbone):
    """Random weights, made on the device."""

    def _from_config(self, device: torch.device, generates: bool) -> nn.Module:
        with torch.device(device):
            return super()._from_config(device, generates)


def wire(words: list[str], size: Size, progress: NoProgress) -> Session:
    """The session of `clpet train` with these words, on a decoder of this size."""
    config = parse_config(compose(overrides(["tracking=off", "cache_dir=null", "model=tiny_llama_s", *words], {})))
    components = Components.build(config)
    benchmark = components.settle(components.source.load(config.data_dir))
    dtype = torch.float32 if components.peft.traits.full else components.hardware.torch_dtype
    backbone = OnDevice(
        name="random",
        random_weights=True,
        config={**size.config, "dtype": str(dtype).removeprefix("torch.")},  # from the start, not cast afterwards
        architecture=Architecture.decoder,
        targets=["q_proj", "v_proj"],
    )
    return Session.assemble(replace(components, backbone=backbone), benchmark, progress)


def text(length: int, rng: random.Random, alphabet: str = "abcdefghijklmnop ") -> str:
    """Random text of this many characters: the tokenizer has a token for every byte."""
    return "".join(rng.choices(alphabet, k=length - 1)) + "."


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def layer_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the seven projections of a block."""
    h, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    q, kv = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    return [(h, q), (h, kv), (h, kv), (q, h), (h, wide), (h, wide), (wide, h)]


def flops_per_token(config: dict[str, Any], length: int, rank: int | None) -> float:
    """Model FLOPs of a training step per token, recomputation not counted; full fine-tuning without `rank`.

    A product with a weight costs 2 a scalar in the forward pass, 2 for the gradient of its input and 2 for that of the
    weight, which frozen weights do not need: 4 n_frozen + 6 n_trained. The input embedding is a look-up. Causal
    attention costs 2 length d a layer in the forward pass (two products, half of the pairs) and twice that backward.
    """
    shapes, layers = layer_shapes(config), config["num_hidden_layers"]
    weights = layers * sum(a * b for a, b in shapes) + config["hidden_size"] * config["vocab_size"]
    attention = 6 * layers * length * config["num_attention_heads"] * config["head_dim"]
    if rank is None:
        return 6 * weights + attention
    return 4 * weights + 6 * layers * sum(rank * (a + b) for a, b in shapes) + attention


def plain_model(auto: Any, part: Part, dtype: torch.dtype) -> nn.Module:
    """A transformers model with random weights, made on the device."""
    from transformers import AutoConfig

    values: dict[str, Any] = dict(part.size.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(part.device):
        model: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model


def with_lora(model: nn.Module, rank: int, targets: list[str]) -> nn.Module:
    """A peft model."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
