"""The C++ kernels of cross entropy: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.core.rows import row_stride
from onepass.ops.cross_entropy.spec import looks_at_targets, wrong_target_error

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

# struct CrossEntropyArgs and CrossEntropyBwdArgs: q = int64_t or pointer, d = double.
_CROSS_ENTROPY = "5q3d5q"
_FWD = struct.Struct(f"={_CROSS_ENTROPY}")
_BWD = struct.Struct(f"={_CROSS_ENTROPY}8q")


@looks_at_targets
def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """loss and lse of each row."""
    rows, columns = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=_CPU)
    lse = torch.empty(rows, dtype=torch.float32, device=_CPU)
    if rows:
        target = target.contiguous()
        logits, stride = row_stride(logits)
        arguments = _FWD.pack(
            DTYPE_CODES[logits.dtype], torch.get_num_threads(), rows, columns, ignore_index,
            label_smoothing, z_loss, softcap,
            logits.data_ptr(), stride, target.data_ptr(), loss.data_ptr(), lse.data_ptr(),
        )  # fmt: skip
        try:
            cpu_library.kernel("cross_entropy_fwd")(arguments)
        except IndexError:  # the kernel looks at the targets anyway; the words are found here
            raise wrong_target_error(target, columns, ignore_index) from None
    return loss, lse


@looks_at_targets
def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int = 0,
    classes: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """dlogits in logits' dtype.

    logits may be the columns first_class, first_class + 1, ... of `classes` (0: they are all); targets count from the
    first of all. `out`, which may be logits itself, receives the result where it is given; its columns are adjacent.
    """
    rows, columns = logits.shape
    classes = classes or columns
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=_CPU) if out is None else out
    if rows:
        target, lse = target.contiguous(), lse.contiguous()
        logits, stride = row_stride(logits)
        arguments = _BWD.pack(
            DTYPE_CODES[logits.dtype], torch.get_num_threads(), rows, columns, ignore_index,
            label_smoothing, z_loss, softcap,
            logits.data_ptr(), stride, target.data_ptr(), 0, lse.data_ptr(),
            dloss.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
            dloss.stride(0), 0 if dlse is None else dlse.stride(0), first_class, classes,
            dlogits.data_ptr(), dlogits.stride(0),
        )  # fmt: skip
        try:
            cpu_library.kernel("cross_entropy_bwd")(arguments)
        except IndexError:
            raise wrong_target_error(target, classes, ignore_index) from None
    return dlogits
