"""Divides the weights of a network over the ranks, and gathers them where FSDP does not do so by itself."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clpet.runtime.distributed import get_world, is_sharded
from clpet.runtime.sharding.tensors import aligned, any_sharded, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Sharding:
    """How the weights of a network are divided: over all ranks, or over those of each of `replicas` groups.

    With `loads` transformers reads the shards from the files; otherwise the network is first on the host of every
    rank. With `trained` all weights are sharded; they are stored in fp32, computed with in `dtype`, and their gradients
    summed in fp32. Without, only the blocks of a frozen network are sharded and the rest is replicated, so that methods
    can call embeddings and output layers by themselves.
    """

    device: torch.device
    replicas: int
    trained: bool
    dtype: torch.dtype
    loads: bool

    def arguments(self, units: Iterable[str]) -> dict[str, object]:
        """Arguments of from_pretrained that let every rank read only its rows; `units` are the names of blocks."""
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

        config = DistributedConfig(
            fsdp_size=get_world().size // self.replicas,
            dp_replicate_size=self.replicas,
            fsdp_plan={replace_layer_number_by_wildcard(name): "free_full_weight" for name in units},
            fsdp_mixed_precision=self.trained and self.dtype is not torch.float32,
        )
        return {"distributed_config": config}

    def divide(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        """Shards a network, if it has not been loaded so; from now on ranks run passes together."""
        if not any_sharded(model.parameters()):
            self._shard(model, units)
        self._configure(model)

    def _shard(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        """Shards a network whose weights are on the host of every rank."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        shape = (self.replicas, get_world().size // self.replicas)
        # peft adapts layers on a mesh of this name as if they were not sharded.
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "fsdp"))
        if self.replicas == 1 or not self.trained:  # frozen weights have no gradients to sum over replicas
            mesh = mesh["fsdp"]
        lowers = self.trained and self.dtype is not torch.float32
        policy = MixedPrecisionPolicy(self.dtype, torch.float32) if lowers else MixedPrecisionPolicy()
        for module in [*units, model] if self.trained else units:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.to(self.device)

    def _configure(self, model: nn.Module) -> None:
        """Sets how a sharded network gathers weights and sums gradients."""
        from torch.distributed.fsdp import FSDPModule

        # Blocks of T5 return views. Nothing changes them in place, and gradients are compared in the tests.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        get_world().sharded = True
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            # The loss of a rank is already weighted with its share of the batch: gradients are sums. gloo has no other
            # reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reshard_after_forward(True, recurse=False)
        if not isinstance(model, FSDPModule):
            return
        _start(model)
        if self.trained:
            vars(model.config).pop("distributed_config", None)  # it would be saved
            get_world().mesh = next(value for value in model.parameters() if is_dtensor(value)).device_mesh
            return
        outside = _outside_of_blocks(model)
        for each in outside:
            each.set_reshard_after_backward(False, recurse=False)
        _keep_gathered(outside)


def _start(model: "FSDPModule") -> None:
    """Makes a network the root of its units, which FSDP otherwise does in the first forward pass.

    A layer that is called alone before that pass would become a root.
    """
    model._get_fsdp_state()._lazy_init()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Parts of a network may be called by themselves in this block.

    What is outside of its blocks, such as embeddings and output layer, stays gathered until the end of the block, or
    with gradients until that of the backward pass.
    """
    if get_world().mesh is None:
        yield
        return
    outside = _outside_of_blocks(model)
    _keep_gathered(outside)
    try:
        yield
    finally:
        for module in outside:
            module.set_reshard_after_forward(True, recurse=False)
            if not torch.is_grad_enabled():
                module.reshard()


def _outside_of_blocks(model: nn.Module) -> "list[FSDPModule]":
    """The sharded modules other than blocks, such as the network itself; which ones depends on its plan."""
    from torch.distributed.fsdp import FSDPModule
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = [module for module in model.modules() if not isinstance(module, GradientCheckpointingLayer)]
    return [module for module in modules if isinstance(module, FSDPModule)]


def _keep_gathered(modules: "list[FSDPModule]") -> None:
    """Gathers the weights of modules, which stay so after their forward passes."""
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@contextlib.contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters have other values in this block; afterwards they have their own again."""
    before = {name: value.detach().clone() if is_sharded(value) else value.data for name, value in parameters.items()}
    try:
        _exchange(parameters, values)
        yield
    finally:
        _exchange(parameters, before)


@torch.no_grad()
def _exchange(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if is_sharded(parameter):  # FSDP gathers from the memory that it knows
            parameter.copy_(aligned(values[name], parameter))
        else:
            parameter.data = values[name]
