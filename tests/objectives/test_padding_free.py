"""Rows without padding: examples share a row and are read as if each were alone."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clpet.data.batches import EncodedDataset
from clpet.data.packed_rows import MOST_PLACES, fill, pack_rows
from clpet.errors import ModelError
from clpet.objectives.document_attention import check_separation, check_window, document_mask, document_positions

CPU = torch.device("cpu")
OPTIONS = ["method=sequential", "model=tiny_llama", "objective=text_to_text"]


def test_rows_by_hand() -> None:
    """Inputs of 4, 2 and 2 tokens fill two rows of 4; targets are read from the place in front of each."""
    pool = EncodedDataset([[1, 2], [3], [4, 5]], [0] * 3, [0] * 3, 9, answers=[[6, 7, 8], [6, 7], [8]])
    packed = pack_rows(pool, np.array([1, 0, 2]), CPU)
    assert packed.input_ids.tolist() == [[1, 2, 6, 7], [3, 6, 4, 5]]
    assert packed.documents.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert packed.before.tolist() == [4, 5, 1, 2, 3, 7]  # rows 1, 0 and 2
    single = pack_rows(pool, np.array([1, 0, 2]), CPU, one_row=True)
    assert single.input_ids.tolist() == [[3, 6, 1, 2, 6, 7, 4, 5]]
    assert document_positions(single.documents).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    low = torch.finfo(torch.float32).min
    mask = document_mask(torch.tensor([[0, 0, 1]]), torch.float32, causal=True)
    assert mask.tolist() == [[[[0, low, low], [0, 0, low], [low, low, 0]]]]


def test_padding_is_rare() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 60, 32)
        bins = fill(lengths)
        assert sorted(member for members in bins for member in members) == list(range(32))
        places = len(bins) * max(int(lengths[members].sum()) for members in bins)
        assert places <= MOST_PLACES * lengths.sum()


@pytest.mark.parametrize(
    "more", [[], pytest.param(["model.attention=sdpa", "hardware.micro_batch_size=5"], marks=pytest.mark.slow)]
)
def test_the_loss_and_its_gradient_are_those_of_padded_rows(more: list[str], make) -> None:
    """Equal to 1e-6, and equal weights after a fit up to rounding."""
    padded, free = (make(*OPTIONS, *more, "train.epochs=1", f"hardware.padding_free={on}") for on in ("false", "true"))
    rows = padded.data.train.rows_of(0, 1)
    work = free.method.objective.work(free.data.train.batch(rows))
    packed = pack_rows(free.data.train, rows, CPU)
    assert ((work.examples, work.source), work.outputs) == (packed.input_ids.shape, len(packed.before))
    losses = [run.method.objective.loss(run.data.train.batch(rows)) for run in (padded, free)]
    assert abs(losses[0] - losses[1]) < 1e-6
    logits = [run.method.objective.logits(run.data.train.batch(rows)) for run in (padded, free)]
    assert torch.allclose(*logits, atol=1e-5)
    for run in (padded, free):
        run.learn(0)
    states = [run.method.state_dict()["objective"]["adapters"]["default"] for run in (padded, free)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


def decoder(kind: str, **sizes: int) -> torch.nn.Module:
    """A small decoder with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=20, **sizes)).eval()


def test_models_are_probed() -> None:
    """GPT-2 keeps texts apart; BLOOM has no position ids; Mamba carries its state from one text to the next."""
    check_separation(decoder("gpt2", n_embd=16, n_layer=1, n_head=2), "gpt2", torch.float32)
    for kind, sizes in (("bloom", {"n_layer": 1, "n_head": 2}), ("mamba", {"num_hidden_layers": 1})):
        with pytest.raises(ModelError, match=f"model {kind} does not keep texts in a row apart: set it to false"):
            check_separation(decoder(kind, hidden_size=16, **sizes), kind, torch.float32)


def test_windows_of_attention_are_refused() -> None:
    """Mistral reads 6 tokens back, and Gemma 3 in some layers; a Qwen 2 with the same number does not use it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    mistral, gemma = decoder("mistral", **sizes), decoder("gemma3_text", **sizes)
    for model in (mistral, gemma):
        with pytest.raises(ModelError, match="padding_free=true, but layers of model m attend to windows of 6 tokens"):
            check_window(model, "m", "hardware.padding_free", 7)
    check_window(mistral, "m", "hardware.padding_free", 6)
    check_window(decoder("qwen2", **sizes), "m", "hardware.padding_free", 7)
    check_separation(mistral, "m", torch.float32)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["method=sequential"], "is for decoders with objective=text_to_text"),
        ([*OPTIONS, "peft=prefix"], "does not support vectors in front of a text, as of peft=prefix"),
        ([*OPTIONS, "method=o_lora"], "cannot be used with method=o_lora"),
        ([*OPTIONS, "method=migu"], "cannot be used with method=migu, which reads what layers compute"),
        ([*OPTIONS, "method=ilora", "replay=reservoir"], "cannot be used with method=ilora"),
    ],
)
def test_what_cannot_be_packed_is_refused(options: list[str], line: str, make) -> None:
    with pytest.raises(Exception, match=line):
        make(*options, "hardware.padding_free=true")
