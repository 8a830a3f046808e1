"""The definition of append_kv in plain PyTorch; used only when asked for by name."""

import torch
from torch import Tensor

from onepass.core import kv_formats
from onepass.ops.append_kv.spec import check_append_contents


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_scale_shift: Tensor | None,
    v_scale_shift: Tensor | None,
) -> None:
    """Writes into the caches, and for int4 into the pairs. On a GPU what has no place is written nowhere."""
    check_append_contents(k, k_cache, cache_seqlens, page_table)
    batch, seqlen_new = k.shape[:2]
    pages, page_size = k_cache.shape[:2]
    position = cache_seqlens.long().unsqueeze(1) + torch.arange(seqlen_new, device=k.device)
    if page_table is None:
        row, place = torch.arange(batch, device=k.device).unsqueeze(1).expand_as(position), position
        there = (position >= 0) & (position < page_size)
    else:
        width = page_table.shape[1]
        there = (position >= 0) & (position < width * page_size)
        entry = torch.where(there, position, 0) // max(page_size, 1)
        row = page_table.long().gather(1, entry) if width else torch.zeros_like(position)
        place = position % max(page_size, 1)
        there &= (row >= 0) & (row < pages)
    at = row[there], place[there]
    for x, cache, descale, pairs in (
        (k, k_cache, k_descale, k_scale_shift),
        (v, v_cache, v_descale, v_scale_shift),
    ):
        if pairs is not None:
            packed, scale_shift = kv_formats.quantize_int4(x, pairs.shape[3])
            cache[at] = packed[there]
            pairs[at] = scale_shift[there]
        elif descale is not None:
            stored = kv_formats.quantize_by_head(x, descale, cache.dtype)
            cache.view(torch.uint8)[at] = stored.view(torch.uint8)[there]  # fp8 cannot be indexed
        else:
            cache[at] = x[there]
