"""The facts a kernel of rope is chosen by, and the checks that keep memory safe."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device

_DIMS = 4  # of q and k


class RopeSpec(NamedTuple):
    """Facts of one call of rope; its backward is the same rotation the other way round."""

    arch: str
    dtype: torch.dtype
    interleaved: bool
    partial: bool  # features past rotary_dim are copied
    table: str  # "shared" (seqlen, ...), "batched" (batch, seqlen, ...), or "indexed" by position_ids
    table_dtype: torch.dtype = torch.float32


def rope_facts(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Any, ...]:
    """Checks a call of rope; the fields of its RopeSpec. Raises ValueError or TypeError naming the argument."""
    if not (q.dim() == _DIMS and q.dtype.is_floating_point):
        raise _q_error(q)
    batch, seqlen, _, head_dim = q.shape
    dtype, where = q.dtype, q.device
    k_shape = k.shape
    if not (
        len(k_shape) == _DIMS
        and k_shape[0] == batch
        and k_shape[1] == seqlen
        and k_shape[3] == head_dim
        and k.dtype is dtype
        and k.device == where
    ):
        raise _k_error(k, q)
    table_shape, table_dtype = cos.shape, cos.dtype
    if sin.shape != table_shape or sin.dtype is not table_dtype or sin.device != cos.device:
        raise ValueError(f"sin must be like cos, {checks.describe(cos)}, got {checks.describe(sin)}")
    dims = len(table_shape)
    half = table_shape[-1] if dims else 0
    if not (dims in (2, 3) and 0 < 2 * half <= head_dim):
        raise _rotary_dim_error(cos, q)
    if table_dtype is not torch.float32 and not (table_dtype is torch.float64 and dtype is torch.float64):
        raise TypeError(f"cos and sin must be float32, got {checks.describe(cos)}: make them with onepass.rope_table")
    if cos.device != where:
        raise ValueError(f"cos and sin must be on q's device {where}, got {checks.describe(cos)}")
    if position_ids is None:
        if not (table_shape[-2] == seqlen and (dims == 2 or table_shape[0] == batch)):
            raise _length_error(cos, q)
        table = "shared" if dims == 2 else "batched"
    else:
        _check_position_ids(position_ids, cos, q)
        table = "indexed"
    return device.arch(q), dtype, interleaved, 2 * half < head_dim, table, table_dtype


def require_positions_in_table(position_ids: Tensor | None, cos: Tensor) -> None:
    """ValueError for a position outside the table, where the values can be read without waiting: on the CPU.

    On other devices such a position's output is NaN.
    """
    if position_ids is None or not position_ids.is_cpu or position_ids.numel() == 0:
        return
    least, most = torch.aminmax(position_ids)
    if least < 0 or most >= cos.shape[0]:
        raise position_error(position_ids, cos.shape[0])


def position_error(position_ids: Tensor, positions: int) -> ValueError:
    """For positions of which some are not in a table of so many."""
    least, most = (int(x) for x in torch.aminmax(position_ids))
    return ValueError(
        f"position_ids must be from 0 to {positions - 1}, the table's last position, got {least} to {most}"
    )


def _check_position_ids(position_ids: Tensor, cos: Tensor, q: Tensor) -> None:
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"position_ids must be int32 or int64, got {checks.describe(position_ids)}: "
            "rope_table(position_ids=...) takes floats and gives cos and sin for each position"
        )
    if position_ids.shape != q.shape[:2] or position_ids.device != q.device:
        raise ValueError(
            f"position_ids must be (batch, seqlen) = {tuple(q.shape[:2])} on {q.device}, "
            f"got {checks.describe(position_ids)}"
        )
    if cos.dim() != 2 or (cos.shape[0] == 0 and q.numel()):
        raise ValueError(
            f"cos and sin must be a table (positions, rotary_dim / 2) with position_ids, got {checks.shape(cos)}"
        )


def _q_error(q: Tensor) -> Exception:
    if not q.dtype.is_floating_point:
        return TypeError(f"q must be floating point, got {checks.describe(q)}")
    return ValueError(f"q must be (batch, seqlen, nheads_q, head_dim), got {checks.shape(q)}")


def _k_error(k: Tensor, q: Tensor) -> Exception:
    if k.dtype is not q.dtype:
        return TypeError(f"k must have q's dtype {str(q.dtype).removeprefix('torch.')}, got {checks.describe(k)}")
    if k.device != q.device:
        return ValueError(f"k must be on q's device {q.device}, got {checks.describe(k)}")
    batch, seqlen, _, head_dim = q.shape
    return ValueError(
        f"k must be (batch, seqlen, nheads_kv, head_dim) = ({batch}, {seqlen}, any, {head_dim}) as q, "
        f"got {checks.shape(k)}"
    )


def _rotary_dim_error(cos: Tensor, q: Tensor) -> ValueError:
    wanted = "(seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2)"
    if cos.dim() in (2, 3) and cos.shape[-1] > 0:
        return ValueError(
            f"cos and sin must be {wanted} with rotary_dim at most head_dim {q.shape[-1]}: got {checks.shape(cos)}, "
            f"a rotary_dim of {2 * cos.shape[-1]} (tables that repeat their columns are cut to the first half)"
        )
    return ValueError(f"cos and sin must be {wanted}, got {checks.shape(cos)}")


def _length_error(cos: Tensor, q: Tensor) -> ValueError:
    batch, seqlen = q.shape[:2]
    half = cos.shape[-1]
    wanted = f"({seqlen}, {half})" if cos.dim() == 2 else f"({batch}, {seqlen}, {half})"
    advice = ""
    if cos.dim() == 2 and cos.shape[0] > seqlen:
        advice = ": cut a longer table to cos[start : start + seqlen], or give position_ids"
    return ValueError(f"cos and sin must be {wanted} for q {checks.shape(q)}, got {checks.shape(cos)}{advice}")
