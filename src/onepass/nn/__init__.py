"""Modules over onepass's functions."""

from onepass.nn.attention import Attention

__all__ = ["Attention"]
