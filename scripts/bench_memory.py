"""Memory and precision of training with LoRA; run by scripts/bench.py.

python scripts/bench.py memory       bytes that a step keeps for its backward pass, LLaMA with 4 layers and LoRA in bf16
python scripts/bench.py precision [model=... benchmark=...]   losses of 200 steps and 5 seeds: fp32, and bf16 in both ways
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from bench import Bench
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clpet.models.adapter_precision import compute_in_input_dtype
from clpet.replay.batch_plan import BatchPlan
from clpet.training.progress import NoProgress
from clpet.training.step import StepHooks
from clpet.training.trainer import Trainer

STEPS, SEEDS = 200, 5
BATCH, LENGTH = 4, 256  # of the memory trial
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, weights excluded."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)


def fp32_products(model: nn.Module) -> None:
    """The former way: the input of a layer is cast to the dtype of the factors."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True


def llama() -> nn.Module:
    """LLaMA with 4 layers of width 512 in bf16, with LoRA of rank 8 on all projections."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = peft.get_peft_model(LlamaModel(config).bfloat16(), peft.LoraConfig(r=8, target_modules=PROJECTIONS))
    compute_in_input_dtype(model, "default")
    return model.train()


def memory(overrides: list[str], rounds: int) -> None:
    """Prints the bytes kept with products in fp32 and in bf16."""
    ids = torch.randint(1000, (BATCH, LENGTH))
    for name, former in (("fp32 products, fp32 copies of inputs", True), ("bf16 products", False)):
        model: Any = llama()
        if former:
            fp32_products(model)
        size = saved_bytes(model, lambda: model(input_ids=ids, use_cache=False).last_hidden_state.float().mean())  # noqa: B023
        print(f"saved for backward, LLaMA with 4 layers, {BATCH} x {LENGTH} tokens, LoRA: {name}: {size / 1e6:.1f} MB")


class Losses(NoProgress):
    """Keeps the mean loss of an epoch so far, from which the loss of each step follows."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def step(self, epoch: int, step: int, examples: int, loss: Tensor) -> None:
        self.means.append(loss.item())

    def steps(self) -> np.ndarray:
        """[steps]: the losses."""
        return np.diff(np.array(self.means) * np.arange(1, len(self.means) + 1), prepend=0.0)


def train(overrides: list[str], seed: int, dtype: str, former: bool) -> np.ndarray:
    """[STEPS]: the losses of a fit on the batches of a seed."""
    bench = Bench([*overrides, f"seed={seed}", f"hardware.dtype={dtype}", "train.global_batch_size=8"])
    method = bench.method()
    if former:
        fp32_products(method.objective.adapters.model)
    pool, rng = method.data.train, np.random.default_rng(seed)
    batches = [batch for _ in range(100) for batch in pool.shuffled(np.arange(len(pool)), 8, rng)][:STEPS]
    losses = Losses()
    trainer = Trainer(bench.config.train, bench.components.hardware, method.objective, losses, seed)
    plan = BatchPlan(pool, len(batches), lambda epoch: batches)
    trainer.fit(plan, method.named_parameters(), StepHooks(method.loss, step_loss=method.step_loss))
    return losses.steps()


def precision(overrides: list[str], rounds: int) -> None:
    """Mean losses over the last 50 of 200 steps, and how far the ways differ from each other and from seed to seed."""
    ways = {"fp32": ("fp32", False), "bf16, fp32 products": ("bf16", True), "bf16 products": ("bf16", False)}
    ends = {
        name: np.array([train(overrides, seed, *way)[-50:].mean() for seed in range(SEEDS)])
        for name, way in ways.items()
    }
    for name, values in ends.items():
        seeds = f"{statistics.stdev(values.tolist()):.4f}"
        print(f"{name:20} mean loss of the last 50 of {STEPS} steps {values.mean():.4f}, between {SEEDS} seeds {seeds}")
    former, now, full = ends["bf16, fp32 products"], ends["bf16 products"], ends["fp32"]
    for name, one, two in (("bf16 products, former way", now, former), ("bf16 products, fp32", now, full),
                           ("former way, fp32", former, full)):  # fmt: skip
        print(f"{name:26} differ by {np.abs(one - two).mean():.5f} on average, {(one - two).mean():+.5f} with sign")
