"""The definition of swiglu and geglu in plain PyTorch, their backward written out; used only when asked for by name.

out = f(gate) * up          dup = dout * f(gate)        dgate = dout * up * f'(gate)

silu        f(x) = x s                  f'(x) = s (1 + x (1 - s)),              s = 1 / (1 + exp(-x))
gelu        f(x) = x Phi(x)             f'(x) = Phi(x) + x phi(x),              the normal distribution and its density
gelu_tanh   f(x) = x s                  f'(x) = s (1 + x (1 - s) 2 t'(x)),      s = 1 / (1 + exp(-2 t)),
            t(x) = sqrt(2 / pi) (x + 0.044715 x^3);  0.5 (1 + tanh t) is 1 / (1 + exp(-2 t))
"""

import math

import torch
from torch import Tensor

from onepass.core.torch_compat import without_autocast

_CUBIC = 0.044715
_DENSITY = 1 / math.sqrt(2 * math.pi)
_TANH_SCALE = 2 * math.sqrt(2 / math.pi)


@without_autocast()
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """out in gate's dtype, contiguous."""
    value, _ = _value_and_slope(_wide(gate), activation)
    return (value * _wide(up)).to(gate.dtype).contiguous()


@without_autocast()
def backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate and dup; empty where not needed."""
    value, slope = _value_and_slope(_wide(gate), activation)
    grad = _wide(dout)
    dgate = (grad * _wide(up) * slope).to(gate.dtype).contiguous() if need_dgate else gate.new_empty(0)
    dup = (grad * value).to(up.dtype).contiguous() if need_dup else up.new_empty(0)
    return dgate, dup


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype is torch.float64 else torch.float32)


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "gelu":
        share = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))  # erf would cancel for negative x
        return x * share, share + x * torch.exp(-0.5 * x * x) * _DENSITY
    if activation == "gelu_tanh":
        share = torch.sigmoid(_TANH_SCALE * (x + _CUBIC * x * x * x))
        bounded = x.clamp(-20.0, 20.0)  # past this the slope's second term is 0, and x * x must not overflow first
        steepness = _TANH_SCALE * (1.0 + 3.0 * _CUBIC * bounded * bounded)
        return x * share, share + x * share * (1.0 - share) * steepness
    share = torch.sigmoid(x)
    return x * share, share * (1.0 + x * (1.0 - share))
