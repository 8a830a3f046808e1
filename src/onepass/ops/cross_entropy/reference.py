"""The definition of cross-entropy in plain PyTorch, its backward written out; used only when asked for by name.

x = logits, or softcap * tanh(logits / softcap)         lse = log(sum(exp(x)))        p = exp(x - lse)
loss = lse - (1 - e) * x[target] - e * mean(x) + z_loss * lse^2                       e = label_smoothing

dx = (dloss * (1 + 2 * z_loss * lse) + dlse) * p - dloss * ((1 - e) * [column is target] + e / classes)
dlogits = dx * (1 - tanh(logits / softcap)^2)

Rows of ignore_index: loss 0, and no dloss. A target that is no class: loss and gradient NaN. These launchers' arguments
are those of every backend.
"""

import torch
from torch import Tensor

from onepass.core.torch_compat import without_autocast
from onepass.ops.cross_entropy.spec import loss_dtype


@without_autocast()
def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """loss and lse of each row, fp32 (fp64 for fp64). logits (rows, classes), target (rows,) int64."""
    x, _ = _capped(logits, softcap)
    largest = x.amax(-1)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    lse = shift + torch.log(torch.exp(x - shift.unsqueeze(-1)).sum(-1))
    valid = (target >= 0) & (target < x.shape[-1])
    picked = x.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * x.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(valid, loss, torch.nan)
    return torch.where(target == ignore_index, 0.0, loss), lse


@without_autocast()
def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int = 0,
    classes: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """dlogits in logits' dtype.

    logits may be the columns first_class, first_class + 1, ... of `classes` (0: they are all); targets count from the
    first of all. `out`, which may be logits itself, receives the result where it is given.
    """
    classes = classes or logits.shape[-1]
    x, slope = _capped(logits, softcap)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    g = torch.where(counted, torch.where(valid, dloss, torch.nan), 0.0)
    total = g * (1 + 2 * z_loss * lse) if z_loss else g
    if dlse is not None:
        total = total + dlse
    dx = total.unsqueeze(-1) * torch.exp(x - lse.unsqueeze(-1))
    column = torch.arange(first_class, first_class + x.shape[-1], device=x.device)
    hot = column == target.unsqueeze(-1)
    dx = dx - g.unsqueeze(-1) * ((1 - label_smoothing) * hot.to(x.dtype) + label_smoothing / classes)
    if slope is not None:
        dx = dx * slope
    if dlse is None:
        dx = torch.where(counted.unsqueeze(-1), dx, 0.0)
    dx = dx.to(logits.dtype)
    return dx.contiguous() if out is None else out.copy_(dx)


@without_autocast()
def reduce(loss: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """The rows' sum or mean, and what a row's loss is multiplied by in it: 1 / counted rows; empty for the sum."""
    total = loss.sum()
    if not mean:
        return total, loss.new_empty(0)
    count = (target != ignore_index).sum()
    return total / count, 1 / count.to(loss.dtype)


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """x and dx / dlogits (None: 1)."""
    x = logits.to(loss_dtype(logits.dtype))
    if softcap == 0:
        return x, None
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, 1 - tanh.square()


def scale(gradient: Tensor, by: Tensor) -> None:
    """gradient times a number (), in place."""
    gradient.mul_(by)
