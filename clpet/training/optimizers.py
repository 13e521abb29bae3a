"""The optimisers that train.optimizer names. A new one is an entry of `OPTIMIZERS`."""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clpet.config.schema import OptimizerState, Training
from clpet.errors import ConfigError, HostError, suggest
from clpet.records import Tree
from clpet.runtime.sharding.gradients import local_gradient
from clpet.runtime.sharding.tensors import aligned, local, trainable_rows, wrap
from clpet.training.bf16_moments import AdamWBf16

Named = Mapping[str, nn.Parameter]
Moments = dict[str, Tree]  # what an optimiser keeps for one tensor; empty before its first step


class Undecayed(nn.Parameter):
    """A trained tensor that weight decay leaves as it is, such as numbers that multiply a method's branches."""


class Optimizer:
    """Updates the trained tensors of a fit, with one optimiser of torch or with several that divide the tensors."""

    def __init__(self, named: Named, settings: Training) -> None:
        self.parameters = list(named.values())
        self.rows = [trainable_rows(parameter) for parameter in self.parameters]
        self.parts = OPTIMIZERS[settings.optimizer].create(dict(zip(named, self.rows, strict=True)), settings)
        pairs = zip(self.parameters, self.rows, strict=True)
        _exempt(self.parts, {id(rows) for parameter, rows in pairs if isinstance(parameter, Undecayed)})

    def step(self, lr: float) -> None:
        """Updates all tensors that have a gradient."""
        for parameter, rows in zip(self.parameters, self.rows, strict=True):
            rows.grad = local_gradient(parameter)
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def zero_grad(self) -> None:
        """Removes all gradients."""
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def moments(self) -> list[Moments]:
        """What the optimiser keeps for each tensor, in their order."""
        states = {id(rows): state for optimizer in self.parts for rows, state in optimizer.state.items()}
        pairs = zip(self.parameters, self.rows, strict=True)
        return [wrap_all(states.get(id(rows), {}), rows, parameter) for parameter, rows in pairs]

    def load_moments(self, moments: Sequence[Mapping[str, Tree]]) -> None:
        """Restores what `moments` returned, in an optimiser that has made no step."""
        triples = zip(self.rows, self.parameters, moments, strict=True)
        saved = {id(rows): rows_of_all(state, parameter) for rows, parameter, state in triples if state}
        for optimizer in self.parts:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            copies = {i: _copy(saved[id(value)]) for i, value in enumerate(parameters) if id(value) in saved}
            optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})


def _exempt(parts: Sequence[torch.optim.Optimizer], ids: set[int]) -> None:
    """Moves the tensors with these ids to groups of their own, without weight decay."""
    for optimizer in parts if ids else ():
        for group in [*optimizer.param_groups]:
            moved = [value for value in group["params"] if id(value) in ids]
            if moved:
                group["params"] = [value for value in group["params"] if id(value) not in ids]
                optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0})


def wrap_all(moments: Mapping[str, Tree], rows: Tensor, parameter: Tensor) -> Moments:
    """The moments of a rank's rows as sharded tensors, if the parameter is sharded."""
    return {
        name: wrap(value, parameter) if isinstance(value, Tensor) and value.shape == rows.shape else value
        for name, value in moments.items()
    }


def rows_of_all(moments: Mapping[str, Tree], parameter: Tensor) -> Moments:
    """A parameter's moments, of any layout, for the rows of this rank."""
    return {
        name: local(aligned(value, parameter)) if isinstance(value, Tensor) and value.dim() else value
        for name, value in moments.items()
    }


def _copy(moments: Mapping[str, Tree]) -> Moments:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in moments.items()}


def same_shape(parameter: Tensor, moments: Mapping[str, Tree]) -> Mapping[str, Tree]:
    """Moments for a parameter; empty if none of them has its shape, as after a head has grown."""
    shapes = [value.shape for value in moments.values() if isinstance(value, Tensor)]
    return moments if parameter.shape in shapes else {}


def size(named: Named) -> int:
    """Bytes of all tensors."""
    return sum(value.numel() * value.element_size() for value in named.values())


@dataclass(frozen=True)
class Kind:
    """One value of train.optimizer: how it is made, the optional settings it uses, and what it needs of the machine."""

    create: Callable[[Named, Training], list[torch.optim.Optimizer]]
    uses: tuple[str, ...]  # of OPTIONAL
    require: Callable[[torch.device], None] = lambda device: None  # raises HostError
    by_element: bool = True  # a scalar's step depends on its own gradients only, so that rows can be divided over ranks
    moment_bytes: Callable[[Named, Training], int] = lambda named, settings: 2 * size(named)  # of all tensors


def _adamw(named: Named, settings: Training) -> list[torch.optim.Optimizer]:
    parameters, betas, decay = list(named.values()), _betas(settings), settings.weight_decay
    return [torch.optim.AdamW(parameters, betas=betas, eps=settings.eps, weight_decay=decay, fused=True)]


def _adamw8bit(named: Named, settings: Training) -> list[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    parameters, betas, decay = list(named.values()), _betas(settings), settings.weight_decay
    return [AdamW8bit(parameters, betas=betas, eps=settings.eps, weight_decay=decay)]


def _adamw_bf16(named: Named, settings: Training) -> list[torch.optim.Optimizer]:
    return [AdamWBf16(named.values(), _betas(settings), settings.eps, settings.weight_decay)]


def _muon(named: Named, settings: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and AdamW for the rest (Jordan et al., 2024).

    Muon's step is scaled to the size of AdamW's (Liu et al., 2025, arXiv 2502.16982), so that both have one rate and
    one weight decay.
    """
    matrices = {name: value for name, value in named.items() if is_block_matrix(name, value)}
    rest = {name: value for name, value in named.items() if name not in matrices}
    parts = _adamw(rest, settings) if rest else []
    if matrices:
        momentum = 0.95 if settings.momentum is None else settings.momentum
        decay, scale = settings.weight_decay, "match_rms_adamw"
        parts.append(
            torch.optim.Muon(list(matrices.values()), weight_decay=decay, momentum=momentum, adjust_lr_fn=scale)
        )
    return parts


def _sgd(named: Named, settings: Training) -> list[torch.optim.Optimizer]:
    decay, momentum = settings.weight_decay, settings.momentum or 0.0
    return [torch.optim.SGD(list(named.values()), momentum=momentum, weight_decay=decay)]


def _betas(settings: Training) -> tuple[float, float]:
    return settings.betas[0], settings.betas[1]


def is_block_matrix(name: str, value: Tensor) -> bool:
    """Whether a trained tensor is a matrix of a numbered module, such as encoder.layer.3, and not an embedding."""
    is_matrix = value.dim() == 2 and min(value.shape) > 1
    in_block = re.search(r"[a-z_]\.\d+\.", name) and not re.search("embed|relative_attention_bias", name)
    return is_matrix and bool(in_block)


def _moments_of_8_bits(named: Named, settings: Training) -> int:
    """Two moments of a byte, and of four bytes in small tensors, which bitsandbytes does not quantize."""
    counts = [value.numel() for value in named.values()]
    return sum(2 * count * (1 if count >= 4096 else 4) for count in counts)


def _moments_of_bf16(named: Named, settings: Training) -> int:
    return 2 * 2 * sum(value.numel() for value in named.values())


def _moments_of_muon(named: Named, settings: Training) -> int:
    """One moment of the matrices of blocks, and two of the rest."""
    return 2 * size(named) - size({name: value for name, value in named.items() if is_block_matrix(name, value)})


def _require_muon(device: torch.device) -> None:
    if not hasattr(torch.optim, "Muon"):
        raise HostError(f"train.optimizer=muon needs torch 2.9 or newer, not {torch.__version__}: pip install -U torch")


def _require_bitsandbytes(device: torch.device) -> None:
    if device.type != "cuda" or not importlib.util.find_spec("bitsandbytes"):
        raise HostError("train.optimizer=adamw8bit needs a CUDA device, and `pip install bitsandbytes`")


OPTIMIZERS = {
    "adamw": Kind(_adamw, ("betas", "eps")),
    "adamw8bit": Kind(_adamw8bit, ("betas", "eps"), _require_bitsandbytes, False, _moments_of_8_bits),
    "adamw_bf16": Kind(_adamw_bf16, ("betas", "eps"), moment_bytes=_moments_of_bf16),
    "muon": Kind(_muon, ("betas", "eps", "momentum"), _require_muon, False, _moments_of_muon),
    "sgd": Kind(_sgd, ("momentum",), moment_bytes=lambda named, settings: size(named) if settings.momentum else 0),
}
OPTIONAL = ("betas", "eps", "momentum")  # settings of `train` that not every optimiser uses


def check_optimizer(settings: Training, device: torch.device, sharded: bool = False) -> None:
    """Raises ConfigError for an unknown optimiser or a setting it does not use, HostError if it cannot run here.

    `sharded`: the trained weights are divided over ranks.
    """
    name = settings.optimizer
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown train.optimizer={name}{suggest(name, OPTIMIZERS)}")
    default = Training()
    for option in OPTIONAL:
        if option not in OPTIMIZERS[name].uses and getattr(settings, option) != getattr(default, option):
            users = ", ".join(user for user, kind in OPTIMIZERS.items() if option in kind.uses)
            raise ConfigError(f"train.optimizer={name} does not use train.{option}, which is for {users}: remove it")
    if name == "sgd" and not settings.momentum and settings.optimizer_state is OptimizerState.carry:
        raise ConfigError("train.optimizer_state=carry needs train.momentum with sgd, which keeps nothing without it")
    if sharded and not OPTIMIZERS[name].by_element:
        raise ConfigError(
            f"train.optimizer={name} does not support weights that hardware.shard=true divides over ranks: use adamw"
        )
    OPTIMIZERS[name].require(device)
