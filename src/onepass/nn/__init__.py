"""Modules over onepass's functions."""

from onepass.nn.attention import Attention
from onepass.nn.gated import GeGLU, SwiGLU
from onepass.nn.norm import LayerNorm, RMSNorm
from onepass.nn.rotary import RepeatKV, RotaryEmbedding

__all__ = ["Attention", "GeGLU", "LayerNorm", "RMSNorm", "RepeatKV", "RotaryEmbedding", "SwiGLU"]
