"""Device functions that Gluon kernels of several operations share, and Gluon's names that differ between versions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# cp.async into shared memory: Triton 3.9 has renamed it.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
commit_group = async_copy.commit_group
wait_group = async_copy.wait_group


@gluon.jit
def exp(x):
    """e^x of fp32 on NVIDIA GPUs; what is below 2^-126 is 0."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=gl.float32, is_pure=True, pack=1
    )
