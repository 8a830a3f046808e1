"""Modules over onepass's functions."""

from onepass.nn.attention import Attention
from onepass.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from onepass.nn.softmax import Softmax

__all__ = ["Attention", "CrossEntropyLoss", "LinearCrossEntropyLoss", "Softmax"]
