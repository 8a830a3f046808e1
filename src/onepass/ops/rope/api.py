"""rope: defaults and checks of the options."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import checks
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.rope import kernels, registration, spec

_HINTS = {
    "unsqueeze_dim": "q and k are (batch, seqlen, nheads, head_dim); pass a (b, h, s, d) tensor as x.transpose(1, 2)",
    "seqlen_offsets": "cut the table, cos[start : start + seqlen], or give position_ids",
    "interleave": "did you mean interleaved=?",
    "inplace": "inputs are never modified",
}


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k in one launch (Su et al. 2021, "RoFormer").

    Each pair (x1, x2) of features becomes (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        q: (batch, seqlen, nheads_q, head_dim), floating point, any strides, read in place.
        k: (batch, seqlen, nheads_kv, head_dim), q's dtype, any strides, read in place.
        cos, sin: fp32, (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2), as `rope_table` makes them;
            rotary_dim is at most head_dim, and features past it are copied.
        interleaved: False turns the pairs (i, i + rotary_dim / 2) (Llama as Hugging Face stores it), True the pairs
            (2 i, 2 i + 1) (GPT-J, Llama as Meta stores it).
        position_ids: (batch, seqlen), int32 or int64: cos and sin are then a table of any length, and these are its
            rows. A position outside the table is an error on the CPU; on a GPU, where the values cannot be read without
            waiting for them, its token's turned features are NaN.
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        q and k, rotated, in their shapes and dtype, contiguous. Computed in fp32 and rounded once. Both are
        differentiable any number of times, deterministically; cos and sin receive no gradient.

    Raises:
        ValueError: shapes, devices or options contradict. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(rope, next(iter(unknown)), _HINTS)
    return registration.rotated(*_canonical(q, k, cos, sin, interleaved, position_ids, backend))


def _canonical(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    position_ids: Tensor | None,
    backend: str | None,
) -> tuple[Any, ...]:
    """The arguments of the operation rope."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
            checks.require_tensor(name, tensor)
    if position_ids is not None:
        checks.require_tensor("position_ids", position_ids)
    if interleaved is not True and interleaved is not False:
        checks.require_bool("interleaved", interleaved)
    if cos.requires_grad or sin.requires_grad:
        checks.require_no_grad("cos", cos, "pass it detached")
        checks.require_no_grad("sin", sin, "pass it detached")
    return q, k, cos, sin, position_ids, interleaved, False, backend_in_use() if backend is None else backend


# What `explain` asks.


@explains("rope")
def _explain(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    backend: str | None = None,
) -> list[Choice]:
    *arguments, named = _canonical(q, k, cos, sin, interleaved, position_ids, backend)
    choices = [choose(kernels.FORWARD, spec.rope_facts(*arguments), named)]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        choices.append(choices[0])
    return choices
