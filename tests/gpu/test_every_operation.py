"""What every operation with a kernel for GPUs keeps to there, forward and backward: CUDA graphs, and no waiting."""

from pathlib import Path
from typing import Any

import pytest
import torch

import onepass.ops
from onepass.testing import conformance, numerics

_OPS = {path.parent.name for folder in onepass.ops.__path__ for path in Path(folder).glob("*/triton")}
_CASES = [pytest.param(case, id=f"{op}: {case.name}") for op, case in numerics.cases() if op in _OPS]

pytestmark = pytest.mark.gpu


def _inputs(case: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = case.inputs(torch.bfloat16, "cuda", generator)
    if "triton" not in case.backends(inputs):
        pytest.skip("Triton's kernels refuse this case")
    return inputs


@pytest.mark.parametrize("case", _CASES)
def test_a_cuda_graph_replays_forward_and_backward(case: Any, generator: torch.Generator) -> None:
    """Captured with some inputs, replayed with others in their place: the same bits as an eager call with those."""
    inputs, others = (_inputs(case, generator) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            case.call(inputs, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.call(inputs, "triton")
    for name, x in others.items():
        numerics.overwrite(inputs[name], x)
    expected = case.call(others, "triton")
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for name, x in expected.items():
            assert conformance.same_bits(outputs[name], x), name


@pytest.mark.parametrize("case", _CASES)
def test_nothing_waits_for_the_gpu(case: Any, generator: torch.Generator) -> None:
    inputs = _inputs(case, generator)
    case.call(inputs, "triton")  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode(before)
