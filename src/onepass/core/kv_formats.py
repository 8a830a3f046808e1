"""The formats of quantised key and value caches, in plain PyTorch: what their kernels compute.

int8, fp8   x / descale, rounded half to even; descale is fp32, one for each KV head, or for each sequence and KV head
int4        two features in a byte, the even one in the low nibble; x = nibble * scale + shift with an fp16 pair
            (scale, shift) for each group of features of each row
"""

import torch
from torch import Tensor

INT4_LEVELS = 15
_FP16_LARGEST = torch.finfo(torch.float16).max


def quantize_int4(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(..., d) -> bytes (..., d / 2) and (scale, shift) (..., groups, 2). The range of a group is cut evenly."""
    parts = x.to(torch.float32).unflatten(-1, (groups, -1))
    low, high = parts.aminmax(dim=-1, keepdim=True)
    shift = low.clamp(-_FP16_LARGEST, _FP16_LARGEST).half()
    scale = ((high - shift.float()) / INT4_LEVELS).clamp(0.0, _FP16_LARGEST).half()
    steps = (parts - shift.float()) / scale.float()
    nibbles = torch.where(scale == 0, 0.0, steps).round().clamp(0, INT4_LEVELS).to(torch.uint8).flatten(-2)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, torch.cat([scale, shift], -1)


def dequantize_int4(packed: Tensor, scale_shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (..., d) of bytes (..., d / 2) and their pairs (..., groups, 2)."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(dtype)
    scale, shift = scale_shift.to(dtype).unbind(-1)
    parts = nibbles.unflatten(-1, (scale_shift.shape[-2], -1))
    return (parts * scale.unsqueeze(-1) + shift.unsqueeze(-1)).flatten(-2)


def quantize_by_head(x: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seqlen, nheads_kv, d) in int8 or fp8; what is too large becomes the largest."""
    scale = descale if descale.dim() == 2 else descale.unsqueeze(0)
    steps = x.to(torch.float32) / scale[:, None, :, None]
    if dtype is torch.int8:
        return steps.round().clamp(-127, 127).to(dtype)
    largest = torch.finfo(dtype).max
    return steps.clamp(-largest, largest).to(dtype)
