"""The optimisers: their first steps by hand, which tensors Muon updates, and a learned task for each."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clpet.config.schema import Training
from clpet.errors import HostError
from clpet.evaluation.evaluator import Evaluator
from clpet.training.optimizers import OPTIMIZERS, Optimizer, Undecayed, check_optimizer, is_block_matrix, same_shape
from tests.conftest import double

LR = 0.1


def steps(name: str, parameter: nn.Parameter, gradients: list[Tensor], settings: Training) -> list[list]:
    """The values of a tensor after each step."""
    optimizer, values = Optimizer({name: parameter}, settings), []
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step(LR)
        optimizer.zero_grad()
        values.append(parameter.tolist())
    assert parameter.grad is None
    return values


def test_adamw_first_step_has_the_size_of_the_rate() -> None:
    """p (1 - lr decay) - lr sign(g), whatever the size of the gradient."""
    settings = Training(weight_decay=0.5)
    ((one, two),) = steps("a", nn.Parameter(double([1, 1])), [double([1e-3, -8])], settings)
    assert (one, two) == pytest.approx((0.95 - 0.1, 0.95 + 0.1), rel=1e-4)


def test_sgd_adds_the_decay_to_the_gradient_and_sums_with_momentum() -> None:
    """g + decay p is 0.6, then 0.594; the buffer is 0.6, then 0.9 * 0.6 + 0.594 = 1.134."""
    settings = Training(optimizer="sgd", momentum=0.9, weight_decay=0.1)
    values = steps("a", nn.Parameter(double([1])), [double([0.5])] * 2, settings)
    assert values == [pytest.approx([0.94]), pytest.approx([0.8266])]
    plain = Training(optimizer="sgd", weight_decay=0)
    assert steps("a", nn.Parameter(double([1])), [double([0.5])] * 2, plain) == [[0.95], pytest.approx([0.9])]


def test_muon_first_step_has_equal_singular_values() -> None:
    """A diagonal gradient keeps its singular vectors; five Newton-Schulz iterations take its singular values near 1.

    The iteration is s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5, from s / (sum of squares)^(1/2), and the step 0.2
    sqrt(rows) lr times the result. Muon computes it in bfloat16.
    """
    values = [3 / math.sqrt(10), 1 / math.sqrt(10)]
    for _ in range(5):
        values = [3.4445 * s - 4.775 * s**3 + 2.0315 * s**5 for s in values]
    assert all(0.6 < value < 1.3 for value in values)
    settings = Training(optimizer="muon", weight_decay=0.5)
    gradient = torch.tensor([[3.0, 0], [0, 1.0], [0, 0]])
    (matrix,) = steps("layer.0.weight", nn.Parameter(torch.ones(3, 2)), [gradient], settings)
    step = [0.2 * math.sqrt(3) * LR * value for value in values]
    expected = [0.95 - step[0], 0.95, 0.95, 0.95 - step[1], 0.95, 0.95]
    assert np.ravel(matrix) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("base_model.model.encoder.layer.0.attention.self.query.lora_A.weight", (8, 32), True),
     ("h.3.mlp.c_proj.weight", (8, 32), True), ("2.model.layers.1.self_attn.q_proj.B", (32, 8), True),
     ("encoder.layer.0.output.dense.bias", (32,), False), ("layers.0.ia3_l", (32, 1), False),
     ("embeddings.word_embeddings.weight", (266, 32), False), ("weight", (4, 32), False), ("prompt0", (10, 32), False),
     ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False)],
)  # fmt: skip
def test_muon_is_for_the_matrices_of_blocks(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_block_matrix(name, torch.zeros(shape)) is expected


def test_muon_leaves_the_rest_to_adamw(make) -> None:
    """The same gradients move the head as with AdamW, and the matrices of the adapter differently."""
    after = {}
    for name in ("adamw", "muon"):
        run = make("method=sequential", f"train.optimizer={name}", "train.epochs=1", "train.global_batch_size=24")
        run.learn(0)
        after[name] = {key: value.detach() for key, value in run.method.named_parameters().items()}
    equal = {key for key, value in after["adamw"].items() if torch.equal(value, after["muon"][key])}
    assert {"weight", "bias"} <= equal
    assert equal - {"weight", "bias"} == {key for key in equal if "lora_A" in key}  # their first gradient is 0


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "muon", "sgd"])
def test_each_optimiser_learns(name: str, make) -> None:
    rate = ["train.lr=0.1", "train.momentum=0.9"] if name == "sgd" else ["train.lr=2e-2"]
    run = make("method=sequential", "train.epochs=6", "train.global_batch_size=4", f"train.optimizer={name}", *rate)
    run.learn(0)
    assert Evaluator(run.benchmark, run.data)(run.method, 1, [0]).per_task[0].value > 50  # chance: 25


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw_bf16", "muon", "sgd"])
def test_moments_are_restored(name: str) -> None:
    """A second optimiser that gets the moments of the first makes the same next step, bit for bit."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")  # on a CPU it updates tensors of less than 4,096 values, in 32 bits
    settings = Training(optimizer=name, momentum=None if "adamw" in name else 0.8)
    torch.manual_seed(0)
    one = {"layer.0.weight": nn.Parameter(torch.randn(4, 3)), "bias": nn.Parameter(torch.randn(3)),
           "untrained": nn.Parameter(torch.ones(2))}  # fmt: skip
    two = {key: nn.Parameter(value.detach().clone()) for key, value in one.items()}
    first, second = Optimizer(one, settings), Optimizer(two, settings)
    for step in range(2):
        for key in ("layer.0.weight", "bias"):
            one[key].grad = torch.randn(one[key].shape)
            two[key].grad = one[key].grad.clone()
        first.step(LR)
        if step == 1:
            second.step(LR)
        else:
            second.load_moments(first.moments())
            for key, value in one.items():
                two[key].data.copy_(value)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert [bool(state) for state in first.moments()] == [True, True, False]
    moments = first.moments()[0]
    assert same_shape(one["layer.0.weight"], moments) == moments
    assert same_shape(torch.zeros(5, 3), moments) == {}


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "muon", "sgd"])
def test_weight_decay_leaves_some_tensors_as_they_are(name: str) -> None:
    """With a gradient of 0 the others shrink; moments are those of their tensor, also when they are loaded."""
    named = {"a": nn.Parameter(torch.ones(3)), "b": Undecayed(torch.ones(2)), "c": nn.Parameter(torch.ones(4))}
    optimizers = [Optimizer(named, Training(optimizer=name, weight_decay=0.1)) for _ in range(2)]
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step(0.5)
    assert [round(value[0].item(), 6) for value in named.values()] == [0.95, 1.0, 0.95]
    optimizers[1].load_moments(optimizers[0].moments())
    shapes = [[value.shape for value in state.values() if value.dim()] for state in optimizers[1].moments()]
    assert shapes == ([[(3,)] * 2, [(2,)] * 2, [(4,)] * 2] if name != "sgd" else [[], [], []])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("adamw", {}, 8 * 20), ("adamw_bf16", {}, 4 * 20), ("muon", {}, 4 * 12 + 8 * 8), ("sgd", {}, 0),
     ("sgd", {"momentum": 0.9}, 4 * 20)],
)  # fmt: skip
def test_bytes_of_moments_are_those_after_a_step(name: str, options: dict[str, float], expected: int) -> None:
    """A matrix of 12 scalars in a block and a vector of 8, in fp32; counters of steps do not count."""
    settings = Training(optimizer=name, **options)
    named = {"layer.0.weight": nn.Parameter(torch.ones(4, 3)), "bias": nn.Parameter(torch.ones(8))}
    optimizer = Optimizer(named, settings)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(LR)
    tensors = [value for state in optimizer.moments() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in tensors if value.dim()) == expected
    assert OPTIMIZERS[name].moment_bytes(named, settings) == expected


def test_bytes_of_moments_of_eight_bits() -> None:
    """One byte a scalar and moment, four in tensors of less than 4,096 scalars."""
    named = {"large": nn.Parameter(torch.ones(64, 64)), "small": nn.Parameter(torch.ones(10))}
    assert OPTIMIZERS["adamw8bit"].moment_bytes(named, Training(optimizer="adamw8bit")) == 2 * 4096 + 2 * 4 * 10


def test_eight_bits_need_cuda_and_a_package() -> None:
    expected = "train.optimizer=adamw8bit needs a CUDA device, and `pip install bitsandbytes`"
    with pytest.raises(HostError, match=expected):
        check_optimizer(Training(optimizer="adamw8bit"), torch.device("cpu"))
    if not importlib.util.find_spec("bitsandbytes"):
        with pytest.raises(HostError, match=expected):
            check_optimizer(Training(optimizer="adamw8bit"), torch.device("cuda"))


def test_an_optimiser_is_one_entry(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one needs a function from the named tensors and the settings to optimisers of torch."""
    from clpet.training.optimizers import Kind

    monkeypatch.setitem(
        OPTIMIZERS, "rprop", Kind(lambda named, settings: [torch.optim.Rprop(list(named.values()))], ())
    )
    run = make("method=sequential", "train.optimizer=rprop", "train.epochs=1")
    before = {key: value.detach().clone() for key, value in run.method.named_parameters().items()}
    run.learn(0)
    assert any(not torch.equal(value, run.method.named_parameters()[key]) for key, value in before.items())
