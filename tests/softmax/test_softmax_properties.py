"""What must be equal to the bit, and a row that must not see its neighbours."""

import pytest
import torch

import onepass


def _both(x: torch.Tensor, dy: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = onepass.softmax(x, backend=backend)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("shape", [(7, 300), (3, 20000), (2, 70000)])
def test_twice_the_same_bits(shape: tuple[int, int], fused: str, device: str, generator: torch.Generator) -> None:
    x, dy = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    for first, second in zip(_both(x, dy, fused), _both(x, dy, fused), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("columns", [5, 300, 20000])
def test_a_row_alone_is_the_row_among_others(columns: int, fused: str, device: str, generator: torch.Generator) -> None:
    x, dy = (torch.randn(9, columns, generator=generator).to(device) for _ in range(2))
    x[3] = torch.nan
    x[5] = -torch.inf
    for among, alone in zip(_both(x, dy, fused), _both(x[4:5], dy[4:5], fused), strict=True):
        assert torch.equal(among[4:5], alone)
        assert among[3].isnan().all()
        assert among[5].isnan().all()


def test_rows_sum_to_one(fused: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(4, 5000, generator=generator).to(device) * 10
    torch.testing.assert_close(onepass.softmax(x, backend=fused).sum(-1), torch.ones(4, device=device))


def test_widest_row(fused: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(1, 262144, generator=generator).to(device)
    y, dx = _both(x, x, fused)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    torch.testing.assert_close(dx, y * (x - (x * y).sum()), atol=1e-8, rtol=1e-4)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st() -> None:
    x = torch.zeros(2**15 + 3, 2**16, dtype=torch.float16, device="cuda")
    x[-1, 7] = 9.0
    y = onepass.softmax(x, backend="triton")
    torch.testing.assert_close(y[-1], torch.softmax(x[-1], -1))
    dx = torch.ops.onepass.softmax_bwd(y, y, "triton")
    torch.testing.assert_close(dx[-1], torch.ops.onepass.softmax_bwd(y[-1:], y[-1:], "reference")[0])
