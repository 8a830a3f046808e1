"""onepass: fused transformer kernels. Each operation reads its inputs once and writes its result once.

One public function per operation serves every machine; `explain` tells what a call would run, `use_backend` decides it.
Importing this package needs torch alone. `onepass.nn` (modules) and `onepass.lab` (attention in four steps) are
imported when they are first used.
"""

import importlib
from typing import Any

from onepass.core.errors import UnsupportedError
from onepass.core.registry import explain, use_backend
from onepass.ops.append_kv.api import append_kv
from onepass.ops.attention.api import attention, attention_decode, merge_attention
from onepass.ops.attention.api_varlen import attention_varlen
from onepass.ops.cross_entropy.api import cross_entropy, linear_cross_entropy
from onepass.ops.norm.api import layer_norm, rms_norm
from onepass.ops.quantize.api import quantize_kv_int4
from onepass.ops.repeat_kv.api import repeat_kv
from onepass.ops.rope.api import rope
from onepass.ops.rope.table import RopeScaling, rope_table
from onepass.ops.softmax.api import softmax
from onepass.ops.swiglu.api import geglu, swiglu

__version__ = "0.1.0"

__all__ = [
    "RopeScaling",
    "UnsupportedError",
    "append_kv",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "explain",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "merge_attention",
    "quantize_kv_int4",
    "repeat_kv",
    "rms_norm",
    "rope",
    "rope_table",
    "softmax",
    "swiglu",
    "use_backend",
]

_SUBPACKAGES = ("lab", "nn")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"onepass.{name}")
    raise AttributeError(f"module 'onepass' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
