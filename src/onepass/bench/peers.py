"""What onepass is measured against, as its users run it: PyTorch eager and compiled, Liger-Kernel, QuACK.

Attention's peers take PyTorch's own layout, `(batch, nheads, seqlen, head_dim)`. Those of the other operations are in
tables of `Peer`; their calls take our inputs by our names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS_RMS_NORM, EPS_LAYER_NORM = 1e-6, 1e-5  # our defaults
LIGER, QUACK = "liger_kernel", "quack"


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention; lengths must be equal when causal (its alignment is top-left)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(q k^T) v as one writes it in PyTorch; `hidden` (seqlen_q, seqlen_k) is True where a key is not seen."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def sdpa_decode_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over a cache of fewer KV heads, left to PyTorch: q (b, nheads_q, 1, d), k, v (b, nheads_kv, s, d)."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def sdpa_decode_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the query heads of one KV head folded into rows, which PyTorch's users do for speed."""
    batch, nheads_q, _, head_dim = q.shape
    folded = q.reshape(batch, k.shape[1], nheads_q // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)


Inputs = Mapping[str, Any]


def _same(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Peer:
    """One other way to compute an operation.

    call:       takes the operation's inputs by name, returns its outputs: a tensor or a tuple.
    adapt:      the inputs as the peer's users hold them; runs once, untimed.
    overwrites: inputs that the peer destroys, "do" (the gradient that comes in) among them: it gets its own copies,
                which are restored before each timed call.
    package:    the module it needs besides PyTorch; it then runs on GPUs only.
    """

    call: Callable[..., Any]
    adapt: Callable[[Inputs], Inputs] = _same
    overwrites: tuple[str, ...] = ()
    package: str = ""

    def unavailable(self) -> str:
        """Why it cannot run here; empty when it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""


# Softmax.


def _liger_softmax(x: Tensor) -> Any:
    from liger_kernel.ops import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply(x)


def _quack_softmax(x: Tensor) -> Any:
    from quack.softmax import softmax

    return softmax(x)


SOFTMAX = {
    "eager": Peer(lambda x: torch.softmax(x, -1)),
    "liger": Peer(_liger_softmax, package=LIGER),
    "quack": Peer(_quack_softmax, package=QUACK),
}

# Norms.


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS_RMS_NORM)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Any:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS_RMS_NORM)


def _quack_rms_norm(x: Tensor, weight: Tensor) -> Any:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=EPS_RMS_NORM)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS_LAYER_NORM)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    from liger_kernel.ops import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS_LAYER_NORM)


RMS_NORM = {
    "eager": Peer(_rms_norm),
    "liger": Peer(_liger_rms_norm, overwrites=("do",), package=LIGER),
    "quack": Peer(_quack_rms_norm, package=QUACK),
}
LAYER_NORM = {"eager": Peer(_layer_norm), "liger": Peer(_liger_layer_norm, package=LIGER)}

# RoPE. Hugging Face's models keep cos and sin for both halves of a head, in the model's dtype.


def _hugging_face_tables(inputs: Inputs) -> Inputs:
    tables = {name: torch.cat((inputs[name],) * 2, -1).to(inputs["q"].dtype).unsqueeze(-2) for name in ("cos", "sin")}
    return {**inputs, **tables}


def _rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((-x2, x1), -1)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    heads_first = q.transpose(1, 2), k.transpose(1, 2)  # the shape that it takes; in memory it wants ours
    q, k = LigerRopeFunction.apply(*heads_first, cos, sin, None, 1, 2 * cos.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2)


ROPE = {
    "eager": Peer(_rope, _hugging_face_tables),
    "liger": Peer(_liger_rope, overwrites=("q", "k", "do"), package=LIGER),
}

# Gated activations.


def _liger_swiglu(gate: Tensor, up: Tensor) -> Any:
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_geglu(gate: Tensor, up: Tensor) -> Any:
    from liger_kernel.ops import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)


SWIGLU = {
    "eager": Peer(lambda gate, up: F.silu(gate) * up),
    "liger": Peer(_liger_swiglu, overwrites=("gate", "up"), package=LIGER),
}
GEGLU_TANH = {
    "eager": Peer(lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "liger": Peer(_liger_geglu, overwrites=("gate", "up"), package=LIGER),
}

# KV heads, as Hugging Face's models repeat them.


def _repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    return x[:, :, :, None, :].expand(batch, seqlen, heads, n_rep, head_dim).reshape(batch, seqlen, -1, head_dim)


REPEAT_KV = {"eager": Peer(_repeat_kv)}

# Losses.


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _liger_cross_entropy(logits: Tensor, target: Tensor) -> Any:
    from liger_kernel.ops import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, target, None)[0]


def _quack_cross_entropy(logits: Tensor, target: Tensor) -> Any:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target)


def _liger_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Any:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


CROSS_ENTROPY = {
    "eager": Peer(_cross_entropy),
    "liger": Peer(_liger_cross_entropy, overwrites=("logits",), package=LIGER),
    "quack": Peer(_quack_cross_entropy, package=QUACK),
}
LINEAR_CROSS_ENTROPY = {
    "eager": Peer(lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target)),
    "liger": Peer(_liger_linear_cross_entropy, package=LIGER),
}
