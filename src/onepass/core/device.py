"""Facts about the device a tensor lives on, as kernels' tables read them."""

from functools import lru_cache

import torch
from torch import Tensor


def arch(tensor: Tensor) -> str:
    """The architecture a kernel is chosen by: "cpu", "sm_90", "gfx942", or the device's type.

    Tensors that are not strided are nowhere: "cpu with layout sparse_coo".
    """
    if tensor.layout is not torch.strided:
        return f"{tensor.device.type} with layout {str(tensor.layout).removeprefix('torch.')}"
    return "cpu" if tensor.is_cpu else _arch(tensor.device)


@lru_cache(maxsize=64)
def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def allows_tf32(tensor: Tensor) -> bool:
    """True when the caller lets fp32 products on this tensor's device run in TF32."""
    return tensor.is_cuda and tensor.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32


def named(name: str) -> torch.device:
    """The device that a user asked for by name. Raises ValueError when there is no such device on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; expected cpu, cuda, cuda:1, ...") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not there: PyTorch {torch.__version__} sees {count} CUDA devices")
    return device
