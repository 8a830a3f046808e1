"""The definition of rope in plain PyTorch; used only when asked for by name.

(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)      for each pair of the rotary_dim first features of each head
inverse: sin -> -sin. That is also the gradient's rotation, whatever cos and sin are.
"""

import torch
from torch import Tensor

from onepass.core.torch_compat import without_autocast
from onepass.ops.rope.spec import require_positions_in_table


@without_autocast()
def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k rotated, in their dtype, contiguous."""
    if position_ids is not None:
        require_positions_in_table(position_ids, cos)
        cos, sin = _look_up(cos, position_ids), _look_up(sin, position_ids)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    if inverse:
        sin = -sin
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _look_up(table: Tensor, position_ids: Tensor) -> Tensor:
    if table.shape[0] == 0:
        return table.new_empty(*position_ids.shape, table.shape[1])
    inside = (position_ids >= 0) & (position_ids < table.shape[0])
    return torch.where(inside.unsqueeze(-1), table[torch.where(inside, position_ids, 0)], torch.nan)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim].to(cos.dtype), x[..., rotary_dim:]
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, -1)
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1).contiguous()
