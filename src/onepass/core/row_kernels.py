"""The kernel tables of row-wise operations: C++ on the CPU, Triton on GPUs, plain PyTorch by name; 32 and 16 bits.

_ROWS = RowKernels("onepass.ops.softmax", SoftmaxSpec, lambda spec: {"x's": spec.dtype})
FORWARD = _ROWS.table("softmax", cpu="cpu:forward", triton="triton.fwd:forward", reference="reference:forward")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class RowKernels:
    """What the tables of one operation share.

    folder: the package that the launchers' paths start from.
    spec:   the NamedTuple that the kernels judge; it has a field `arch`.
    dtypes: the dtypes that count, by whose they are ("x's"); None where an argument is not given.
    slow:   what `explain` says of the reference.
    """

    folder: str
    spec: Callable[..., Any]
    dtypes: Callable[[Any], Mapping[str, torch.dtype | None]]
    slow: str = "plain PyTorch: the definition, several passes over memory"

    def table(self, op: str, *, cpu: str, triton: str, reference: str) -> KernelTable:
        """The table of one direction. Paths are "module:function" inside the folder."""
        return KernelTable(
            op,
            self.spec,
            [
                Kernel("cpu", 10, self._cpu_unsupported, self._path(cpu), unavailable=cpu_library.unavailable),
                triton_backend.row(self._triton_unsupported, self._path(triton)),
                Kernel(
                    "reference",
                    0,
                    self._reference_unsupported,
                    self._path(reference),
                    lambda spec: [self.slow],
                    by_name_only=True,
                ),
            ],
        )

    def _path(self, launcher: str) -> str:
        return f"{self.folder}.{launcher}"

    def _cpu_unsupported(self, spec: Any) -> list[str]:
        return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + self._dtypes_unsupported(spec)

    def _triton_unsupported(self, spec: Any) -> list[str]:
        return triton_backend.unsupported_arch(spec.arch) + self._dtypes_unsupported(spec)

    def _reference_unsupported(self, spec: Any) -> list[str]:
        return self._dtypes_unsupported(spec, torch.float64)

    def _dtypes_unsupported(self, spec: Any, *more: torch.dtype) -> list[str]:
        return [
            f"{name} dtype {dtype_name(dtype)}: float32, bfloat16 and float16 only"
            for name, dtype in self.dtypes(spec).items()
            if dtype is not None and dtype not in (*DTYPES, *more)
        ]


def by_dtype(plain: Any, *fields: str) -> dict[str, Any]:
    """Specs for a support table: `plain` with each dtype in `dtype` and in `fields`, fp64 among them."""
    return {
        dtype_name(dtype): plain._replace(**dict.fromkeys(("dtype", *fields), dtype))
        for dtype in (*DTYPES, torch.float64)
    }
