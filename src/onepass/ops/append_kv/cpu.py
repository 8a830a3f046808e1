"""The C++ kernel of append_kv: packs a call into the argument struct of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import CACHE_CODES, CACHE_PLAIN, DTYPE_CODES
from onepass.ops.append_kv.spec import check_append_contents

# struct AppendKvArgs.
_ARGS = struct.Struct("=32q")


def append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, k_scale_shift: Tensor | None, v_scale_shift: Tensor | None,
) -> None:  # fmt: skip
    cache_seqlens = cache_seqlens.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    try:  # the kernel looks at all places before it writes, and k's are v's
        _append(k, k_cache, cache_seqlens, page_table, k_descale, k_scale_shift)
        _append(v, v_cache, cache_seqlens, page_table, v_descale, v_scale_shift)
    except IndexError:  # the words are found here
        check_append_contents(k, k_cache, cache_seqlens, page_table)
        raise


def _append(
    x: Tensor, cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None, descale: Tensor | None,
    pairs: Tensor | None,
) -> None:  # fmt: skip
    batch, seqlen, nheads, head_dim = x.shape
    descale_strides = (
        (0, 0) if descale is None else (descale.stride(0) if descale.dim() == 2 else 0, descale.stride(-1))
    )
    cpu_library.kernel("append_kv")(
        _ARGS.pack(
            DTYPE_CODES[x.dtype], torch.get_num_threads(), CACHE_CODES.get(cache.dtype, CACHE_PLAIN),
            batch, seqlen, nheads, head_dim, cache.shape[0], cache.shape[1], 1 if pairs is None else pairs.shape[3],
            x.data_ptr(), *x.stride(), cache.data_ptr(), *cache.stride(), cache_seqlens.data_ptr(),
            *((0, 0) if page_table is None else (page_table.data_ptr(), page_table.shape[1])),
            *((0, *descale_strides) if descale is None else (descale.data_ptr(), *descale_strides)),
            *((0,) * 6 if pairs is None else (pairs.data_ptr(), *pairs.stride())),
        )
    )  # fmt: skip
