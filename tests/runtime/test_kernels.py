"""What a training pass keeps and how it computes: activations on the host, TF32, and options that a machine lacks."""

import importlib.util

import pytest
import torch
from torch import nn

from clpet.errors import ConfigError, HostError
from clpet.runtime.hardware import Device, Hardware, Kernels
from clpet.runtime.kernels import OFFLOADED, offloaded, tf32


def test_offloaded_activations_give_the_same_gradient() -> None:
    """Large activations are copied, and nothing else: neither weights nor small tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 600), nn.Tanh(), nn.Linear(600, 2))
    x = torch.randn(512, 512)
    gradients, copies = [], []
    for offload in (False, True):
        model.zero_grad()
        if offload:
            with offloaded(model.parameters()):
                hidden = model[1](model[0](x))
                saved = hidden.grad_fn._saved_result
                copies += [saved.data_ptr() != hidden.data_ptr(), torch.equal(saved, hidden)]
                loss = model[2](hidden).square().sum()
        else:
            loss = model(x).square().sum()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert x.nbytes >= OFFLOADED
    assert copies == [True, True]
    assert all(map(torch.equal, *gradients))


def test_tf32_is_for_gpus() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32(torch.device("cpu"), torch.bfloat16):
        assert torch.get_float32_matmul_precision() == before
    with tf32(torch.device("cuda"), torch.float32):
        assert torch.get_float32_matmul_precision() == before
    with tf32(torch.device("cuda"), torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"hardware\.offload=true needs a CUDA device"):
        Hardware(device=Device.cpu, offload=True)
    if not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        with pytest.raises(HostError, match=r"needs a CUDA device, and `pip install liger-kernel`"):
            Hardware(kernels=Kernels.liger)
    with pytest.raises(ConfigError, match=r"hardware\.compile must be false with hardware\.shard=true"):
        Hardware(device=Device.cpu, compile=True, shard=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match=r"needs a C\+\+ compiler, which this machine lacks: install g\+\+"):
        Hardware(device=Device.cpu, compile=True)


@pytest.mark.slow
def test_branches_that_are_mixed_per_batch_are_not_compiled(make) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.compile cannot be used with method=o_lora"):
        make("method=o_lora", "hardware.compile=true")
