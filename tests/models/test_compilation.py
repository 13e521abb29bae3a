"""Compiled blocks: the same outputs, and no compilation for an adapter that has run before."""

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertConfig, BertModel

from clpet.models.adapter_precision import compute_in_input_dtype
from clpet.models.compilation import compile_blocks
from clpet.runtime.hardware import Hardware

NAMES = ("one", "two")
CONFIG = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)


@pytest.mark.slow
def test_adapters_switch_without_compilation() -> None:
    """With the graphs of dynamo run as they are: what a backend makes of them is not tested here."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: nn.Module = BertModel(BertConfig(intermediate_size=32, **sizes)).eval()
    model = peft.get_peft_model(model, CONFIG, adapter_name="one")
    model.add_adapter("two", CONFIG)
    for name in NAMES:
        compute_in_input_dtype(model, name)

    def read(name: str, length: int) -> torch.Tensor:
        model.set_adapter(name)
        output: torch.Tensor = model(input_ids=torch.arange(2 * length).view(2, length)).last_hidden_state
        return output

    calls = [(name, length) for length in (5, 7, 6) for name in NAMES]
    plain = [read(*call) for call in calls]
    counter = CompileCounterWithBackend("eager")
    compile_blocks(model, counter)
    try:
        assert all(torch.allclose(read(*call), output, atol=1e-6) for call, output in zip(calls, plain, strict=True))
        assert counter.frame_count > 0
        compiled = counter.frame_count
        for call in [*calls, ("one", 9), ("two", 11)]:
            read(*call)
        assert counter.frame_count == compiled
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(make) -> None:
    """With the C++ compiler of this machine, for a single step of one block; equal up to rounding."""
    try:
        Hardware(compile=True)
    except Exception as error:
        pytest.skip(str(error))
    plain, compiled = (
        make(
            "method=sequential",
            "model=tiny_llama",
            "train.epochs=1",
            "train.global_batch_size=24",
            "model.config.num_hidden_layers=1",
            f"hardware.compile={on}",
        )
        for on in ("false", "true")
    )
    for run in (plain, compiled):
        run.learn(0)
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in (plain, compiled)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])
    torch._dynamo.reset()
