"""The public functions of attention: defaults, canonical forms, and checks of the options."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import checks, torch_compat
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.attention import kernels, registration, spec

# Sizes past these change nothing and would not fit the operations' int64 arguments.
_LARGEST_SPLITS = 2**31 - 1
_LARGEST_WINDOW = 2**62

# How other libraries spell options that attention has, or does not need.
HINTS = {
    "attn_mask": (
        "a padding mask is key_mask (batch, seqlen_k) bool with True = seen, a band is window_size or causal=True, "
        "and any other mask is an additive attn_bias with -inf where a key is unseen"
    ),
    "mask": "a padding mask is key_mask (batch, seqlen_k) bool with True = seen; else attn_bias, window_size",
    "key_padding_mask": "use key_mask (batch, seqlen_k) bool with True = seen, the inverse of key_padding_mask",
    "is_causal": "use causal=True; it aligns to the bottom right, causal_alignment='top_left' is PyTorch's",
    "scale": "use softmax_scale=",
    "enable_gqa": "nothing is needed: k and v may have fewer heads than q",
    "return_softmax_lse": "use return_lse=True",
    "return_attn_probs": "use return_lse=True; the probabilities are never stored",
    "bias": "use attn_bias=",
    "dropout": "use dropout_p=",
    "block_table": "use page_table=",
    "cu_seqlens_q": "packed sequences go to onepass.attention_varlen",
    "cu_seqlens_k": "packed sequences go to onepass.attention_varlen",
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """softmax(softmax_scale * q k^T + bias and masks) v, without ever storing the scores.

    Args:
        q: (batch, seqlen_q, nheads_q, head_dim), floating point. Any strides, read in place.
        k: (batch, seqlen_k, nheads_kv, head_dim), q's dtype. nheads_q must be a multiple of nheads_kv; query head h
            reads KV head h // (nheads_q // nheads_kv).
        v: (batch, seqlen_k, nheads_kv, head_dim_v), q's dtype.
        causal: query i sees keys j <= i + shift. shift = seqlen_k - seqlen_q, or 0 with causal_alignment="top_left".
        causal_alignment: "bottom_right" or "top_left"; sets shift for causal, window_size and alibi_slopes alike.
        softmax_scale: any finite number; None is head_dim ** -0.5.
        window_size: (left, right), -1 = unlimited: keys i + shift - left <= j <= i + shift + right.
        softcap: when above 0, scaled scores s become softcap * tanh(s / softcap).
        alibi_slopes: fp32 (nheads_q,) or (batch, nheads_q): adds -slope * abs(i + shift - j). No gradient.
        attn_bias: broadcastable to (batch, nheads_q, seqlen_q, seqlen_k), q's dtype or fp32, added to the scores;
            differentiable. A key whose bias is -inf is unseen.
        attn_sink: (nheads_q,), q's dtype or fp32: one logit more per head, which adds no value; differentiable.
        key_mask: bool (batch, seqlen_k), True = seen.
        dropout_p: the probability with which a weight is dropped, 0 to 1.
        generator: draws rng_state in eager calls; not together with rng_state.
        rng_state: int64 (2,) = (seed, offset) on q's device; the dropout mask is a function of it alone.
        deterministic: a backward that gives the same bits every time; None follows torch.use_deterministic_algorithms.
        return_lse: also return the log-sum-exp of each row.
        backend: a backend's name, which then never falls back; None chooses. `use_backend` sets it for a block.

    Returns:
        out (batch, seqlen_q, nheads_q, head_dim_v) in q's dtype, contiguous; with return_lse the pair of out and
        lse (batch, nheads_q, seqlen_q), fp32, natural log, the sink included, differentiable.

    A query that sees no key gives out 0, lse -inf (with a sink: lse = sink) and zero gradients. Empty batches and
    lengths are valid. Sums run in fp32. Under autocast the inputs are cast as scaled_dot_product_attention's are.

    Raises:
        ValueError: shapes, devices or options contradict. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call; the message lists every backend's reasons.
    """
    if unknown:
        raise checks.unknown_argument(attention, next(iter(unknown)), HINTS)
    try:
        call = canonical(
            q,
            k,
            v,
            causal,
            causal_alignment,
            softmax_scale,
            window_size,
            softcap,
            alibi_slopes,
            attn_bias,
            attn_sink,
            key_mask,
            dropout_p,
            generator,
            rng_state,
            deterministic,
            backend,
        )
        out, lse = registration.attended(*call)
    except RuntimeError:
        require_strided(
            q=q,
            k=k,
            v=v,
            attn_bias=attn_bias,
            alibi_slopes=alibi_slopes,
            attn_sink=attn_sink,
            key_mask=key_mask,
            rng_state=rng_state,
        )
        raise
    return (out, lse) if return_lse else out


def canonical(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The arguments of the operation attention_fwd."""
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and type(causal) is bool
        and (deterministic is None or type(deterministic) is bool)
    ):
        require_tensors(q=q, k=k, v=v)
        checks.require_bool("causal", causal)
        checks.require_bool("deterministic", deterministic, "or None, which follows PyTorch's setting")
    if causal_alignment == "bottom_right":
        bottom_right = True
    elif causal_alignment == "top_left":
        bottom_right = False
    else:
        raise ValueError(f"causal_alignment must be 'bottom_right' or 'top_left', got {causal_alignment!r}")
    if window_size == (-1, -1):
        window_left = window_right = -1
    else:
        window_left, window_right = _window(window_size)
    if causal:
        window_right = 0
    softmax_scale = _default_scale(q) if softmax_scale is None else checks.finite_float("softmax_scale", softmax_scale)
    if softcap != 0.0:
        softcap = _softcap(softcap)
    if dropout_p != 0.0 or rng_state is not None or generator is not None:
        dropout_p, rng_state = _dropout(q, dropout_p, generator, rng_state)
    if attn_bias is not None or alibi_slopes is not None or attn_sink is not None or key_mask is not None:
        require_tensors(attn_bias=attn_bias, alibi_slopes=alibi_slopes, attn_sink=attn_sink, key_mask=key_mask)
        attn_bias = _four_dimensional(attn_bias)
        _require_no_alibi_gradient(alibi_slopes)
    if torch_compat.autocast_enabled(q):
        q, k, v, attn_bias, attn_sink = _autocast(q, k, v, attn_bias, attn_sink)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        q,
        k,
        v,
        attn_bias,
        alibi_slopes,
        attn_sink,
        key_mask,
        rng_state,
        softmax_scale,
        window_left,
        window_right,
        bottom_right,
        float(softcap),
        float(dropout_p),
        deterministic,
        backend_in_use() if backend is None else backend,
    )


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_sink: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scale_shift: Tensor | None = None,
    v_scale_shift: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Attention of the newest queries over a cache of keys and values; forward only.

    Args:
        q: (batch, seqlen_q, nheads_q, head_dim), one to a few queries, the last ones of each sequence.
        k_cache: (batch, capacity, nheads_kv, head_dim), or (pages, page_size, nheads_kv, head_dim) with page_table.
        v_cache: the same with head_dim_v. Entries past cache_seqlens are never read.
        cache_seqlens: int32 (batch,), the keys stored for each sequence, the queries' own included; None: caches are
            full.
        page_table: int32 (batch, max_pages), the pages of each sequence in order; needs cache_seqlens.
        causal: query i of seqlen_q sees keys j <= i + cache_seqlens - seqlen_q (bottom-right).
        window_size, softmax_scale, softcap, alibi_slopes, attn_sink, backend: as in `attention`, with
            shift = cache_seqlens - seqlen_q.
        k_descale, v_descale: fp32 (nheads_kv,) or (batch, nheads_kv), multiply caches stored in int8 or fp8.
        k_scale_shift, v_scale_shift: of caches stored in int4, uint8 (batch, capacity, nheads_kv, head_dim / 2) with
            the even feature in the low nibble: fp16 (batch, capacity, nheads_kv, groups, 2), with pages (pages,
            page_size, nheads_kv, groups, 2). Of each group of adjacent features, which may be of another number in k
            and v, the pair (scale, shift) makes nibble * scale + shift. `quantize_kv_int4` and `append_kv` write them.
        num_splits: into how many parts the keys are cut to be worked on at once; None chooses.
        return_lse: also return lse (batch, nheads_q, seqlen_q), fp32.

    Returns:
        out (batch, seqlen_q, nheads_q, head_dim_v) in q's dtype, or (out, lse).

    Raises ValueError, TypeError and UnsupportedError as `attention` does; lengths past the cache and pages that do not
    exist are ValueErrors where they can be read without waiting for a device (on the CPU).
    """
    if unknown:
        raise checks.unknown_argument(attention_decode, next(iter(unknown)), HINTS)
    try:
        call = _canonical_decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            page_table,
            causal,
            softmax_scale,
            window_size,
            softcap,
            alibi_slopes,
            attn_sink,
            k_descale,
            v_descale,
            k_scale_shift,
            v_scale_shift,
            num_splits,
            return_lse,
            backend,
        )
        out, lse = registration.decoded(*call)
    except RuntimeError:
        require_strided(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=cache_seqlens,
            page_table=page_table,
            alibi_slopes=alibi_slopes,
            attn_sink=attn_sink,
            k_descale=k_descale,
            v_descale=v_descale,
            k_scale_shift=k_scale_shift,
            v_scale_shift=v_scale_shift,
        )
        raise
    return (out, lse) if return_lse else out


def _canonical_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_sink: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scale_shift: Tensor | None = None,
    v_scale_shift: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The arguments of the operation attention_decode."""
    if not (
        isinstance(q, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor) and type(causal) is bool
    ):
        require_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
        checks.require_bool("causal", causal)
    window_left, window_right = (-1, -1) if window_size == (-1, -1) else _window(window_size)
    if causal:
        window_right = 0
    softmax_scale = _default_scale(q) if softmax_scale is None else checks.finite_float("softmax_scale", softmax_scale)
    if softcap != 0.0:
        softcap = _softcap(softcap)
    if cache_seqlens is not None:
        checks.require_tensor("cache_seqlens", cache_seqlens)
    if page_table is not None or k_descale is not None or v_descale is not None:
        require_tensors(page_table=page_table, k_descale=k_descale, v_descale=v_descale)
    if alibi_slopes is not None or attn_sink is not None:
        require_tensors(alibi_slopes=alibi_slopes, attn_sink=attn_sink)
        _require_no_alibi_gradient(alibi_slopes)
    if k_scale_shift is not None or v_scale_shift is not None:
        require_tensors(k_scale_shift=k_scale_shift, v_scale_shift=v_scale_shift)
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"num_splits must be an int of at least 1, or None to choose, got {num_splits!r}")
    if torch_compat.autocast_enabled(q):
        dtype = torch_compat.autocast_dtype(q)
        q = _cast(q, dtype)
        if k_descale is None and v_descale is None:  # what is uint8 stays so
            k_cache, v_cache = _cast(k_cache, dtype), _cast(v_cache, dtype)
    return (
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table,
        alibi_slopes,
        attn_sink,
        k_descale,
        v_descale,
        k_scale_shift,
        v_scale_shift,
        softmax_scale,
        window_left,
        window_right,
        float(softcap),
        0 if num_splits is None else min(num_splits, _LARGEST_SPLITS),
        bool(return_lse),
        backend_in_use() if backend is None else backend,
    )


def merge_attention(outs: Tensor, lses: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """One result from partial results over disjoint sets of keys: weights exp(lses - lse), lse = logsumexp(lses).

    Args:
        outs: stacked results (n, batch, seqlen_q, nheads_q, head_dim_v), or packed (n, total_q, nheads_q, head_dim_v).
        lses: fp32 (n, batch, nheads_q, seqlen_q), or packed (n, nheads_q, total_q). A part whose lse is -inf adds
            nothing.
        backend: as in `attention`.

    Returns:
        out (batch, seqlen_q, nheads_q, head_dim_v) in outs' dtype and lse (batch, nheads_q, seqlen_q) fp32, or packed.
        Both are differentiable, through outs and lses. A sink must have been given to one part only.

    Raises ValueError, TypeError and UnsupportedError as `attention` does.
    """
    require_tensors(outs=outs, lses=lses)
    if outs is None or lses is None:
        raise TypeError("merge_attention needs outs and lses, stacked along the first dimension")
    try:
        out, lse = registration.merged(outs, lses, backend_in_use() if backend is None else backend)
    except RuntimeError:
        require_strided(outs=outs, lses=lses)
        raise
    return out, lse


# Canonical forms.


def require_tensors(**named: Any) -> None:
    required = ("q", "k", "v", "k_cache", "v_cache")
    for name, value in named.items():
        if value is not None or name in required:
            checks.require_tensor(name, value)


def require_strided(**named: Any) -> None:
    """Asked only after a failure: the kernels' own errors for a sparse tensor do not name it."""
    for name, value in named.items():
        if isinstance(value, Tensor):
            checks.require_strided(name, value)


def _default_scale(q: Tensor) -> float:
    """head_dim ** -0.5; a tensor without dimensions or features is refused later, by name."""
    head_dim = q.shape[-1] if q.dim() else 1
    return float(head_dim**-0.5) if head_dim else 1.0


def _window(window_size: Any) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}") from None
    for name, size in (("left", left), ("right", right)):
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"window_size's {name} must be an int, got {size!r}")
        if size < -1:
            raise ValueError(f"window_size's {name} must be at least 0, or -1 for unlimited, got {size}")
    return _window_side(left), _window_side(right)


def _window_side(size: int) -> int:
    return -1 if isinstance(size, int) and size > _LARGEST_WINDOW else size


def _softcap(softcap: Any) -> float:
    softcap = checks.finite_float("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be above 0, or 0 for none, got {softcap}")
    return softcap


def _dropout(
    q: Tensor, dropout_p: Any, generator: torch.Generator | None, rng_state: Tensor | None
) -> tuple[float, Tensor | None]:
    dropout_p = checks.finite_float("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if generator is not None and rng_state is not None:
        raise ValueError("give generator or rng_state, not both: rng_state alone determines the dropout mask")
    require_tensors(rng_state=rng_state)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != q.device.type:
            raise ValueError(f"generator must be on q's device {q.device}, got one on {generator.device}")
    if rng_state is not None:
        spec.check_rng_state(q, rng_state)
    if dropout_p == 0:
        return 0.0, None
    if rng_state is None:
        rng_state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device, generator=generator)
    return dropout_p, rng_state


def _four_dimensional(attn_bias: Tensor | None) -> Tensor | None:
    if attn_bias is None:
        return None
    if attn_bias.dtype is torch.bool:
        raise TypeError(
            f"attn_bias is added to the scores, got a bool mask {checks.shape(attn_bias)}: {HINTS['attn_mask']}"
        )
    missing = 4 - attn_bias.dim()
    return attn_bias[(None,) * missing] if missing > 0 else attn_bias


def _require_no_alibi_gradient(alibi_slopes: Tensor | None) -> None:
    if alibi_slopes is not None:
        checks.require_no_grad("alibi_slopes", alibi_slopes, "detach it, or add a differentiable attn_bias instead")


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, attn_sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = torch_compat.autocast_dtype(q)
    if attn_bias is not None:
        attn_bias = _cast(attn_bias, dtype)
    if attn_sink is not None and attn_sink.dtype is not torch.float32:
        attn_sink = _cast(attn_sink, dtype)
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype), attn_bias, attn_sink


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floating point but not fp64."""
    return x.to(dtype) if x.dtype.is_floating_point and x.dtype is not torch.float64 else x


# What `explain` asks.


@explains("attention")
def _explain_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Choice]:
    options.pop("return_lse", None)
    if unknown := options.keys() - checks.options_of(attention):
        raise checks.unknown_argument(attention, min(unknown), HINTS)
    require_strided(q=q, k=k, v=v, **options)
    call = canonical(q, k, v, **options)
    arguments, backend = call[:8] + call[9:-1], call[-1]  # all but softmax_scale
    choices = [choose(kernels.FORWARD, spec.attention_facts(*arguments), backend)]
    differentiable = (*call[:4], call[5])  # q, k, v, attn_bias, attn_sink
    need_q, need_k, need_v, need_bias, need_sink = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in differentiable
    )
    needs = (need_q, need_k or need_v, need_bias, need_sink)
    if any(needs):
        arguments += needs
        choices.append(choose(kernels.BACKWARD, spec.attention_facts(*arguments), backend))
    return choices


@explains("attention_decode")
def _explain_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> list[Choice]:
    options.pop("return_lse", None)
    if unknown := options.keys() - checks.options_of(attention_decode):
        raise checks.unknown_argument(attention_decode, min(unknown), HINTS)
    require_strided(q=q, k_cache=k_cache, v_cache=v_cache, **options)
    call = _canonical_decode(q, k_cache, v_cache, **options)
    arguments = call[:11] + call[12:-3]  # all but softmax_scale, num_splits, need_lse and backend
    return [choose(kernels.DECODE, spec.decode_facts(*arguments), call[-1])]


@explains("merge_attention")
def _explain_merge(outs: Tensor, lses: Tensor, *, backend: str | None = None) -> list[Choice]:
    require_tensors(outs=outs, lses=lses)
    require_strided(outs=outs, lses=lses)
    name = backend_in_use() if backend is None else backend
    facts = spec.merge_facts(outs, lses)
    choices = [choose(kernels.MERGE, facts, name)]
    if torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad):
        choices.append(choose(kernels.MERGE_BACKWARD, facts, name))
    return choices
