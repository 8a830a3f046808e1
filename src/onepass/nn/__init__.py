"""Modules over onepass's functions."""

from onepass.nn.attention import Attention
from onepass.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from onepass.nn.gated import GeGLU, SwiGLU
from onepass.nn.norm import LayerNorm, RMSNorm
from onepass.nn.rotary import RepeatKV, RotaryEmbedding
from onepass.nn.softmax import Softmax

__all__ = [
    "Attention",
    "CrossEntropyLoss",
    "GeGLU",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "RepeatKV",
    "RotaryEmbedding",
    "Softmax",
    "SwiGLU",
]
