"""FLOPs by formula: on a case computed by hand, and against the operations that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from clpet.models.flops import NetworkFlops, Pass
from clpet.models.memory_saving import enable_recomputation
from tests.conftest import WORDS

WORK = Pass(3, 10)  # 3 texts of 10 positions


def bert() -> BertModel:
    """Two layers of width 32 with 4 x 32 x 32 + 2 x 32 x 64 = 8192 scalars each in matrices; all of it is trained."""
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))


def test_full_fine_tuning_by_hand() -> None:
    """2 x 16384 x 30 and, for 2 layers of attention, 4 x 2 x 3 x 10 x 10 x 32; twice as much backwards."""
    flops = NetworkFlops.of(bert())
    assert flops.forward(WORK) == 983_040 + 76_800
    assert flops.backward(WORK) == 2 * (983_040 + 76_800)


def test_a_frozen_block_below_the_trained_tensors_has_no_backward_pass() -> None:
    """Trained is the second layer's query, 1024 scalars: the gradient passes the 7168 behind it, and one attention."""
    network = bert().requires_grad_(False)
    network.encoder.layer[1].attention.self.query.requires_grad_(True)
    assert NetworkFlops.of(network).backward(WORK) == 2 * 30 * (7168 + 1024) + 76_800


def test_recomputed_activations_add_a_forward_pass() -> None:
    network = bert()
    plain = NetworkFlops.of(network)
    enable_recomputation(network, uses_dropout=False)
    assert NetworkFlops.of(network).backward(WORK) == plain.backward(WORK) + plain.forward(WORK)


def test_vectors_of_a_prompt_count_as_positions() -> None:
    network = bert().requires_grad_(False)
    prompted = NetworkFlops.of(network, prompt=5, learned_input=True)
    assert prompted.forward(WORK) == NetworkFlops.of(network).forward(Pass(3, 15))
    assert prompted.backward(WORK) == 2 * 16_384 * 45 + 2 * 4 * 2 * 3 * 15 * 15 * 32


@pytest.mark.parametrize(
    ("model", "peft", "high"),
    [("tiny_t5", "lora", 1.15), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("tiny", "none", 1.001), ("tiny", "lora", 1.15), ("tiny_gpt2", "lora", 1.001), ("tiny_llama", "none", 1.001)))],
)  # fmt: skip
def test_the_formula_counts_what_torch_counts(model: str, peft: str, high: float, make) -> None:
    """Forwards equal but for the head and the pooler; backwards the first block with trained tensors counts whole."""
    answers = ["objective=text_to_text", "benchmark.max_target=8"] if model != "tiny" else []
    run = make("method=sequential", f"model={model}", f"peft={peft}", *answers)
    objective, pool = run.method.objective, run.data.train
    run.method.grow_head(0)
    objective.adapters.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        loss = objective.loss(pool.batch(pool.rows_of(0)[:8]))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    cost = objective.meter.cost
    assert cost.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.005)
    assert 0.998 <= cost.backward_flops / backward.get_total_flops() <= high


def test_fisher_per_label_counts_a_backward_pass_per_label(make) -> None:
    labels = len(WORDS["fruit"])
    run = make("method=ewc", "method.fisher=labels", "method.fisher_batches=1")
    run.method.grow_head(0)
    with torch.no_grad():
        run.method.objective.logits(run.data.train.batch([0]))
    assert run.method.objective.meter.cost.backward_flops == 0
    run.method.objective.meter.restart()
    run.method.information(0)
    cost, flops = run.method.objective.meter.cost, run.method.objective.flops.network
    assert cost.backward_examples == labels * cost.forward_examples > 0
    width = cost.forward_tokens // cost.forward_examples
    assert cost.backward_flops == labels * flops.backward(Pass(cost.forward_examples, width))
