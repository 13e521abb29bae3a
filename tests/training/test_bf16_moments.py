"""AdamW with moments in bf16: steps of AdamW, moments that are right on average, and the same numbers on every rank."""

import torch
from torch import nn

from clpet.training.bf16_moments import AdamWBf16, stochastic_bf16

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def test_rounding_is_right_on_average() -> None:
    """1 + 2^-9 lies a quarter of the way from 1 to the next bf16 number, 1 + 2^-7."""
    values = torch.full((40_000,), 1 + 2**-9)
    rounded = stochastic_bf16(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs((rounded > 1).float().mean() - 0.25) < 0.01
    assert torch.equal(stochastic_bf16(-values, torch.Generator().manual_seed(0)).float(), -rounded)
    exact = torch.tensor([0.0, 1.5, -(2.0**100)])
    assert torch.equal(stochastic_bf16(exact, torch.Generator().manual_seed(1)).float(), exact)


def test_steps_are_those_of_adamw() -> None:
    """The first is equal; after 300 the weights differ by less than one percent of the way."""
    torch.manual_seed(0)
    start = torch.randn(64, 32)
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs = AdamWBf16([one], **SETTINGS), torch.optim.AdamW([two], **SETTINGS)
    for step in range(300):
        for parameter, optimizer in ((one, ours), (two, theirs)):
            parameter.grad = (parameter.detach() - 1) + torch.randn(
                64, 32, generator=torch.Generator().manual_seed(step)
            )
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
        if step == 0:
            assert torch.allclose(one, two, atol=1e-7)
    assert (one - two).norm() < 0.01 * (two - start).norm()
    assert {value.dtype for name, value in ours.state[one].items() if name != "step"} == {torch.bfloat16}


def test_the_second_moment_decays() -> None:
    """Without gradients it falls by a factor of 0.999 per step, which rounding to the nearest would undo."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([parameter], **SETTINGS)
    parameter.grad = torch.ones(4096)
    optimizer.step()
    before = optimizer.state[parameter]["exp_avg_sq"].float().mean()
    parameter.grad = torch.zeros(4096)
    for _ in range(200):
        optimizer.step()
    assert abs(optimizer.state[parameter]["exp_avg_sq"].float().mean() / before - 0.999**200) < 0.01
