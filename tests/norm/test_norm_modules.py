"""onepass.nn.RMSNorm and LayerNorm in the place of torch.nn's."""

from typing import Any

import pytest
import torch

import onepass
from onepass import nn


def pairs() -> list[tuple[type[torch.nn.Module], type[torch.nn.Module], tuple[Any, ...], dict[str, Any]]]:
    return [
        (nn.RMSNorm, torch.nn.RMSNorm, (24,), {}),
        (nn.RMSNorm, torch.nn.RMSNorm, ((4, 6),), {}),
        (nn.RMSNorm, torch.nn.RMSNorm, ([24], 1e-3, False), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, (24,), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, (torch.Size((4, 6)), 1e-3), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, (24,), {"bias": False}),
        (nn.LayerNorm, torch.nn.LayerNorm, (24,), {"elementwise_affine": False}),
    ]


@pytest.mark.parametrize(("kind", "twin_kind", "args", "options"), pairs())
def test_is_the_twin(
    kind: Any,
    twin_kind: Any,
    args: Any,
    options: Any,
    backend: str,
    device: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Constructor, parameters, state_dict both ways, forward and gradients."""
    options = {**options, "dtype": dtype, "device": device}
    module, twin = kind(*args, **options, backend=backend), twin_kind(*args, **options)
    assert isinstance(module, twin_kind)
    assert repr(twin).removesuffix(")") in repr(module)
    for ours, theirs in zip(module.state_dict().items(), twin.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    for parameter in twin.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    module.load_state_dict(twin.state_dict())
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 5, *twin.normalized_shape, generator=generator).to(device, dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = module(leaves[0]), twin(leaves[1])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **tolerance)
    dy = torch.randn(y.shape, generator=generator).to(device, dtype)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **tolerance)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=10 * tolerance["rtol"], atol=5 * tolerance["atol"])


def test_default_eps_is_the_twins(backend: str, device: str, dtype: torch.dtype) -> None:
    """eps=None: the epsilon of the dtype that the statistics have. Small numbers tell."""
    x = torch.full((1, 8), 1e-3, dtype=dtype, device=device)
    module = nn.RMSNorm(8, dtype=dtype, device=device, backend=backend)
    torch.testing.assert_close(module(x), torch.nn.RMSNorm(8, dtype=dtype, device=device)(x))
    assert float(module(x).detach()[0, 0]) < 0.99
    double = x.double().cpu()
    ours = nn.RMSNorm(8, dtype=torch.float64, backend="reference")(double * 1e-6)
    torch.testing.assert_close(ours, torch.nn.RMSNorm(8, dtype=torch.float64)(double * 1e-6))


@pytest.mark.parametrize("shape", [24, (4, 6)])
def test_residual(backend: str, device: str, shape: Any, generator: torch.Generator) -> None:
    x, residual = (torch.randn(3, 4, 6, generator=generator).to(device) for _ in range(2))
    if shape == 24:
        x, residual = x.flatten(-2), residual.flatten(-2)
    for kind in (nn.RMSNorm, nn.LayerNorm):
        module = kind(shape, device=device, backend=backend)
        y, total = module(x, residual=residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, module(x + residual))
        with pytest.raises(ValueError, match="residual must have x's shape"):
            module(x, residual=residual[:2])


def test_gemma(backend: str, device: str, generator: torch.Generator) -> None:
    module = nn.RMSNorm(24, eps=1e-6, offset=1.0, device=device, backend=backend)
    assert not module.weight.any()
    x = torch.randn(3, 24, generator=generator).to(device)
    torch.testing.assert_close(module(x), torch.nn.functional.rms_norm(x, (24,), eps=1e-6))
    assert "offset=1.0" in repr(module)
    with pytest.raises(ValueError, match="offset is added to the weight"):
        nn.RMSNorm(24, elementwise_affine=False, offset=1.0)


def test_wrong_shapes() -> None:
    for x in (torch.randn(3, 5), torch.randn(4, 6).T, torch.randn(6)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 4, 6\), got"):
            nn.LayerNorm((4, 6))(x)


def test_exports_are_there() -> None:
    assert set(nn.__all__) <= set(dir(nn))
    assert {"rms_norm", "layer_norm"} <= set(onepass.__all__)
