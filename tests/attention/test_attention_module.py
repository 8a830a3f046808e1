"""onepass.nn.Attention: the function with its options fixed."""

import pytest
import torch

import onepass
from onepass import nn


def test_is_the_function(backend: str, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 9, heads, 16, generator=generator) for heads in (4, 2, 2))
    mask = torch.rand(2, 9, generator=generator) < 0.5
    module = nn.Attention(causal=True, window_size=(4, -1), softmax_scale=0.3, backend=backend)
    options = {"causal": True, "window_size": (4, -1), "softmax_scale": 0.3, "key_mask": mask, "return_lse": True}
    for ours, theirs in zip(
        module(q, k, v, key_mask=mask, return_lse=True),
        onepass.attention(q, k, v, **options, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert "causal=True" in repr(module)
    assert not list(module.parameters())


def test_packed_reads_views(backend: str, generator: torch.Generator) -> None:
    qkv = torch.randn(2, 9, (4 + 2 * 2) * 16, generator=generator, requires_grad=True)
    out = nn.Attention(causal=True, backend=backend).packed(qkv, nheads_q=4, nheads_kv=2)
    heads = qkv.unflatten(-1, (8, 16))
    expected = onepass.attention(heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:], causal=True, backend=backend)
    assert torch.equal(out, expected.flatten(-2))
    do = torch.randn(out.shape, generator=generator)
    (ours,), (theirs,) = (torch.autograd.grad(x, qkv, do.view(x.shape)) for x in (out, expected))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"qkv must be .* with 7 heads, got \(2, 9, 128\)"):
        nn.Attention().packed(qkv, nheads_q=5, nheads_kv=1)


def test_drops_in_training_only(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 9, 2, 16, generator=generator) for _ in range(3))
    module = nn.Attention(dropout_p=0.5, backend="reference")
    plain = onepass.attention(q, k, v, backend="reference")
    state = torch.tensor([1, 2])
    assert not torch.equal(module(q, k, v, rng_state=state), plain)
    assert torch.equal(module.eval()(q, k, v), plain)
