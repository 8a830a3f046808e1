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
    dlse = exact.get("dlse", torch.zeros_like(lse)).abs()
    given = options.get("softmax_scale")
    terms = sizes_of_terms(p, lse, q, k, v, do, dlse, q.shape[3] ** -0.5 if given is None else given)
    ds = terms.pop("ds")
    # delta is computed from out as it is stored.
    eps = torch.finfo(inputs["q"].dtype).eps / torch.finfo(torch.float32).eps
    delta = (do.abs() * (p @ v.abs())).sum(-1)
    delta_rounding = delta * (eps / 2)
    dbias, dsink = ds, torch.zeros(1)
    if "attn_bias" in inputs:
        if inputs["attn_bias"].dtype != inputs["q"].dtype:  # finer than delta
            dbias = ds + p * delta_rounding.unsqueeze(-1)
        dbias = dbias.sum([dim for dim in range(4) if inputs["attn_bias"].shape[dim] == 1], keepdim=True)
    if "attn_sink" in exact:
        weight = torch.exp(exact["attn_sink"].view(-1, 1) - lse) * (1.0 + lse.abs())
        dsink = (weight * (delta + dlse + delta_rounding)).nan_to_num().sum((0, 2))
    largest = {name: float(x.max()) for name, x in (*terms.items(), ("dattn_bias", dbias), ("dattn_sink", dsink))}
    return {"lse": LSE_TERMS, **largest}


def sizes_of_terms(
    p: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, scale: float
) -> dict[str, Tensor]:
    """The sizes of what out, dq, dk and dv sum, and of ds: heads before rows, k and v repeated for the heads of q."""
    q, k, v, do = (x.abs() for x in (q, k, v, do))
    # p is exp(score - maximum), and in the backward exp(score - lse): what rounding takes from a score, p loses
    # relative to itself.
    rounded = p * (1.0 + lse.abs().nan_to_num(posinf=0.0).unsqueeze(-1))
    ds = rounded * (do @ v.mT + ((do * (p @ v)).sum(-1) + dlse.abs()).unsqueeze(-1))
    scaled = abs(scale) * ds
    return {"out": rounded @ v, "dq": scaled @ k, "dk": scaled.mT @ q, "dv": rounded.mT @ do, "ds": ds}
