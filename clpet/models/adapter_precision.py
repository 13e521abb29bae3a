"""LoRA's products in the precision of the layers that it adapts, with factors, gradients and updates in fp32.

peft casts the input of a layer to the dtype of the factors: with a bf16 backbone and fp32 factors both products are
then computed in fp32, and the backward pass keeps an fp32 copy of every input. Here the factors are rounded for the
product instead, as autocast does, but without its effect on the layers of the backbone (it computes norms in fp32).
"""

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class InputDtypeLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever that of its weights is."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def compute_in_input_dtype(model: nn.Module, name: str) -> None:
    """Makes the LoRA adapter `name` of a network compute in the dtype of its inputs; fp32 stays fp32."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name not in layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            for factors in (layer.lora_A, layer.lora_B):
                if name in factors:
                    factors[name] = _twin(factors[name])


def _twin(linear: nn.Module) -> InputDtypeLinear:
    """A layer with the same parameters."""
    assert type(linear) is nn.Linear
    has_bias = linear.bias is not None
    twin = InputDtypeLinear(linear.in_features, linear.out_features, has_bias, device="meta")
    twin.weight, twin.bias = linear.weight, linear.bias
    return twin.train(linear.training)
