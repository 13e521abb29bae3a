"""AdamW with moments in bf16: 4 bytes per trained scalar instead of 8."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) whose weights stay fp32; its moments are rounded to bf16 after every step.

    Rounding is stochastic: up or down with probabilities that make it right on average. With rounding to the nearest
    number the second moment would never decay, since a step changes it by less than half of a bf16 unit. The random
    numbers depend on the step and the tensor alone, so that ranks and resumed runs draw the same.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all tensors that have a gradient."""
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, index)

    def _update(self, parameter: Tensor, gradient: Tensor, group: StateDict, index: int) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step = int(state["step"])
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))
        generator = torch.Generator(parameter.device).manual_seed(step * len(group["params"]) + index)
        state["exp_avg"].copy_(stochastic_bf16(first, generator))
        state["exp_avg_sq"].copy_(stochastic_bf16(second, generator))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, which casts moments to the dtype of the weights; no bit is lost in casting them back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values as bf16, each rounded to one of its two neighbours, to the nearer one with the larger probability."""
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(2**16)  # adds to the bits that bf16 cuts off
    return bits.view(torch.float32).to(torch.bfloat16)
