"""How large what attention's results are summed from is: the third part of the error budget (docs/numerics.md)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from onepass.ops.attention.api import attention

# A relative error of the sum of exponentials is an absolute one of its logarithm.
LSE_TERMS = 1.0
_EXACT_OPTIONS = ("attn_bias", "attn_sink")  # tensors that the oracle takes in fp64


def rounding_terms(inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, float]:
    """The terms of the budget (docs/numerics.md) by result. `inputs`: q, k, v, do, and where there are such dlse, the
    bias and the sink; `options`: keyword arguments of `attention`.
    """
    exact = {name: x.double() for name, x in inputs.items() if name in ("q", "k", "v", "do", "dlse", *_EXACT_OPTIONS)}
    q, k, v, do = (exact[name] for name in ("q", "k", "v", "do"))
    options = {**options, **{name: exact[name] for name in _EXACT_OPTIONS if name in exact}}
    one_hot = torch.eye(k.shape[1], dtype=v.dtype, device=v.device)[None, :, None, :]
    one_hot = one_hot.expand(k.shape[0], -1, k.shape[2], -1)
    p, lse = attention(q, k, one_hot, **options, return_lse=True, backend="reference")
    p = p.transpose(1, 2)
    group = q.shape[2] // k.shape[2]
    q, do = (x.transpose(1, 2) for x in (q, do))
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    dlse = exact.get("dlse", torch.zeros_like(lse))
    sizes = sizes_of_terms(p, lse, q, k, v, do, dlse, options.get("softmax_scale"))
    terms = {name: size for name, size in sizes.items() if name in ("out", "dq", "dk", "dv")}
    terms |= option_terms(sizes, lse, inputs)
    return {"lse": LSE_TERMS, **{name: float(size.max()) for name, size in terms.items()}}


def sizes_of_terms(
    p: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, softmax_scale: float | None
) -> dict[str, Tensor]:
    """The sizes of what out, dq, dk and dv sum, of ds, and of delta = do * out summed over features, for each row and
    for each weight: heads before rows, k and v repeated for the heads of q.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    q, k, v, do = (x.abs() for x in (q, k, v, do))
    # p is exp(score - maximum), and in the backward exp(score - lse): what rounding takes from a score, p loses
    # relative to itself.
    rounded = p * (1.0 + lse.abs().nan_to_num(posinf=0.0).unsqueeze(-1))
    delta = (do * (p @ v)).sum(-1)
    row = delta + dlse.abs()
    ds = rounded * (do @ v.mT + row.unsqueeze(-1))
    results = {"out": rounded @ v, "dq": scale * ds @ k, "dk": scale * ds.mT @ q, "dv": rounded.mT @ do}
    return {**results, "ds": ds, "row": row, "delta": delta, "delta of weights": p * delta.unsqueeze(-1)}


def option_terms(sizes: Mapping[str, Tensor], lse: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sizes of what the gradients of the bias and the sink sum, by `sizes_of_terms`: ds as (batch, nheads, rows,
    keys), what belongs to rows, lse among it, as (..., nheads, rows).
    """
    found = {}
    # delta is computed from out as it is stored: one error a row, which those of other rows are independent of.
    stored = torch.finfo(inputs["q"].dtype).eps / torch.finfo(torch.float32).eps / 2
    if "attn_bias" in inputs:
        bias = inputs["attn_bias"]
        summed = [dim for dim in range(4) if bias.shape[dim] == 1]
        found["dattn_bias"] = dbias = _sum(sizes["ds"], summed)
        # Where nothing is summed, the rounding of a result in q's dtype is as large.
        if bias.dtype != inputs["q"].dtype or dbias.numel() < sizes["ds"].numel():
            of_rows = _sum(sizes["delta of weights"], [dim for dim in summed if dim == 3])
            found["dattn_bias"] = dbias + stored * _root_sum_square(of_rows, [dim for dim in summed if dim != 3])
    if "attn_sink" in inputs:
        weight = torch.exp(inputs["attn_sink"].double().view(-1, 1) - lse)
        rows = (weight * (1.0 + lse.abs()) * sizes["row"]).nan_to_num()
        summed = [dim for dim in range(rows.ndim) if dim != rows.ndim - 2]
        rounding = _root_sum_square((weight * sizes["delta"]).nan_to_num(), summed)
        found["dattn_sink"] = _sum(rows, summed) + stored * rounding
    return found


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x  # torch.sum takes an empty list for all of them


def _root_sum_square(x: Tensor, dims: list[int]) -> Tensor:
    return _sum(x.square(), dims).sqrt()
