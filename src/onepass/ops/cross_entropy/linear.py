"""linear_cross_entropy: logits a strip at a time, PyTorch's matrix products, any backend's cross-entropy.

Gradients at once (mean, sum): for each strip of rows
    logits = x W^T + b;  loss, lse;  dlogits over logits;  dx = dlogits W;  dW += dlogits^T x;  db += sum(dlogits)
Gradients later (none, low_memory, lse returned): the forward finds lse strip by strip, and the backward, for each strip
of classes, makes
    logits = x W^T + b;  dlogits over logits, by lse;  dW = dlogits^T x, complete;  dx += dlogits W;  db = sum(dlogits)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core import torch_compat
from onepass.core.torch_compat import without_autocast
from onepass.ops.cross_entropy.carry import empty_lower
from onepass.ops.cross_entropy.linear_plan import LinearPlan, now_strips, plan, strips
from onepass.ops.cross_entropy.spec import loss_dtype

_MULTIPLE = 128  # strips are whole tiles of a matrix product


@dataclass(frozen=True)
class Losses:
    """A backend's launchers and the options that all of them take."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor]]
    carry: Callable[..., None]
    ignore_index: int
    options: Sequence[float]  # label_smoothing, z_loss, softcap

    def rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(logits, target, self.ignore_index, *self.options)

    def gradient(
        self, dloss: Tensor, dlse: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, *place: int
    ) -> Tensor:
        """dlogits, written over logits."""
        return self.backward(
            dloss, dlse, logits, target, lse, self.ignore_index, *self.options, *(place or (0, 0)), logits
        )


Needs = tuple[bool, bool, bool]  # dx, dweight, dbias


@without_autocast()
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    losses: Losses,
    reduction: str,
    now: bool,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """loss, lse, scale (of the mean), and dx, dweight, dbias of the loss; empty where they are not made."""
    cut = plan(x.device)
    rows, classes = x.shape[0], weight.shape[0]
    now = now and any(needs)
    wide = _for_products(x)
    row_bytes, carried_bits = classes * wide.element_size(), 0
    if now:
        parts, carried_bits = now_strips(rows, row_bytes, cut, weight, _MULTIPLE)
    else:
        parts = strips(rows, row_bytes, cut.rows_bytes, _MULTIPLE)
    loss = torch.empty(rows, dtype=loss_dtype(x.dtype), device=x.device)
    lse = torch.empty_like(loss)
    products = weight.to(x.dtype).to(wide.dtype)
    shift = None if bias is None else bias.to(x.dtype).to(wide.dtype)
    gradients = _Gradients(x, wide, weight, bias, needs, losses.carry, len(parts), cut, carried_bits) if now else None
    dloss = _rows_gradient(loss, target, losses.ignore_index, reduction) if now else loss
    logits = x.new_empty((parts[0][1] if parts else 0, classes))
    for start, end in parts:
        strip = _logits(wide[start:end], products, shift, logits[: end - start])
        loss[start:end], lse[start:end] = losses.rows(strip, target[start:end])
        if gradients is not None:
            strip = losses.gradient(dloss[start:end], None, strip, target[start:end], lse[start:end])
            gradients.add(strip, products, start, end)
    scale = loss.new_empty(0)
    if reduction != "none":
        loss, scale = losses.reduce(loss, target, losses.ignore_index, reduction == "mean")
    none = (x.new_empty(0), x.new_empty(0), x.new_empty(0))
    return loss, lse, scale, *(none if gradients is None else gradients.results())


@without_autocast()
def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    losses: Losses,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, with the logits made again; empty where not needed."""
    need_dx, need_dweight, need_dbias = needs
    rows, classes = x.shape[0], weight.shape[0]
    empty = x.new_empty(0)
    dx = torch.zeros(x.shape, dtype=loss_dtype(x.dtype), device=x.device) if need_dx else empty
    make = torch.empty if rows else torch.zeros
    dweight = make(weight.shape, dtype=weight.dtype, device=x.device) if need_dweight else x.new_empty(0)
    dbias = torch.zeros_like(bias) if need_dbias and bias is not None else x.new_empty(0)
    wide = _for_products(x)
    parts = strips(classes, rows * wide.element_size(), plan(x.device).classes_bytes, _MULTIPLE) if rows else []
    memory = logits = dlogits = x.new_empty(rows * (parts[0][1] if parts else 0))
    for start, end in parts:
        products = weight[start:end].to(x.dtype).to(wide.dtype)
        logits = memory[: rows * (end - start)].view(rows, end - start)
        _logits(wide, products, None if bias is None else bias[start:end].to(x.dtype).to(wide.dtype), logits)
        dlogits = losses.gradient(dloss, dlse, logits, target, lse, start, classes)
        if need_dbias:
            dbias[start:end] = dlogits.sum(0, dtype=loss_dtype(x.dtype))
        dlogits = dlogits.to(wide.dtype)
        if need_dweight:
            _product(dlogits.T, wide, dweight[start:end])
        if need_dx:
            _add_product(dx, dlogits, products)
    del memory, logits, dlogits  # before dx is converted
    return dx.to(x.dtype) if need_dx else dx, dweight, dbias


def _rows_gradient(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The gradient of the result by each row's loss."""
    if reduction == "mean":
        return (1 / (target != ignore_index).sum().to(loss.dtype)).expand(loss.shape)
    return loss.new_ones(()).expand(loss.shape)


class _Gradients:
    """What strips of rows add up to."""

    def __init__(
        self,
        x: Tensor,
        wide: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Needs,
        carry: Callable[..., None],
        count: int,
        cut: LinearPlan,
        carried_bits: int,
    ) -> None:
        self.x = wide
        self.need_dx, need_dweight, need_dbias = needs
        self.dx = torch.empty(x.shape if self.need_dx else 0, dtype=x.dtype, device=x.device)
        self.dweight = _WeightGradient(weight, carry, count, cut, carried_bits) if need_dweight else None
        self.bias = bias if need_dbias else None
        sums = 0 if self.bias is None else self.bias.shape
        self.dbias = torch.zeros(sums, dtype=loss_dtype(x.dtype), device=x.device)

    def add(self, dlogits: Tensor, products: Tensor, start: int, end: int) -> None:
        if self.bias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        dlogits = dlogits.to(self.x.dtype)
        if self.need_dx:
            _product(dlogits, products, self.dx[start:end])
        if self.dweight is not None:
            self.dweight.add(dlogits, self.x[start:end])

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.dx,
            self.dx.new_empty(0) if self.dweight is None else self.dweight.result,
            self.dbias if self.bias is None else self.dbias.to(self.bias.dtype),
        )


class _WeightGradient:
    """dlogits^T x over the strips, in fp32.

    A single strip is one product; a weight of fp32 is its own accumulator; else carry.py holds the sum between strips,
    and slices of classes pass through a small fp32 buffer.
    """

    def __init__(
        self, weight: Tensor, carry: Callable[..., None], count: int, cut: LinearPlan, carried_bits: int
    ) -> None:
        self.carry, self.count, self.seen = carry, count, 0
        make = torch.empty if count else torch.zeros
        self.result = make(weight.shape, dtype=weight.dtype, device=weight.device)
        self.direct = count <= 1 or weight.dtype.itemsize > 2
        if not self.direct:
            self.slices = strips(len(weight), 1, cut.weight_slice, _MULTIPLE)
            self.lower = empty_lower(weight, carried_bits)
            self.sums = weight.new_empty((self.slices[0][1], weight.shape[1]), dtype=torch.float32)

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        self.seen += 1
        first, last = self.seen == 1, self.seen == self.count
        if self.direct:
            if first:
                _product(dlogits.T, x, self.result)
            else:
                _add_product(self.result, dlogits.T, x)
            return
        for start, end in self.slices:
            sums = self.sums[: end - start]
            _product(dlogits[:, start:end].T, x, sums)
            self.carry(sums, self.lower[start:end], self.result[start:end], first, last)


# Products: inputs of one dtype, fp32 inside.


def _for_products(x: Tensor) -> Tensor:
    """x as the products take it: in fp32 where its own dtype would be slow. What they give is rounded to x's dtype."""
    return x.float() if torch_compat.multiplies_slowly(x) else x


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if out.dtype is not x.dtype:
        return out.copy_(torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T))
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, rounded once to out's dtype."""
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype is torch.float32 and a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; a total of fp32 (fp64) is not rounded."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif total.dtype is torch.float32 and a.is_cuda:
        arguments: Any = {"out_dtype": torch.float32, "out": total}
        torch.addmm(total, a, b, **arguments)
    else:
        total += torch.mm(a, b)  # rounded to the inputs' dtype first: no CPU product of halves gives fp32
