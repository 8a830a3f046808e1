"""Requests that make no sense: each message names the argument, what came and what was expected."""

import pytest
import torch

from onepass.lab import STEPS, attention_step

Q = torch.zeros(2, 5, 4, 8)
K = torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a torch.Tensor, got list"),
        ({"q": Q[0]}, ValueError, r"q must be \(batch, seqlen, nheads, head_dim\), got \(5, 4, 8\)"),
        ({"v": K[None]}, ValueError, r"v must be \(batch, seqlen, nheads, head_dim\)"),
        ({"q": Q.double()}, TypeError, r"q must be float32, got float64 \(2, 5, 4, 8\) on cpu.*onepass.attention"),
        ({"k": K.bfloat16()}, TypeError, r"k must be float32, got bfloat16"),
        ({"v": K.to("meta")}, ValueError, r"v must be on the CPU, got float32 \(2, 7, 2, 8\) on meta"),
        (
            {"k": K[:1]},
            ValueError,
            r"k must be .* = \(2, seqlen_k, nheads_kv, 8\) like q \(2, 5, 4, 8\), got \(1, 7, 2, 8\)",
        ),
        ({"k": K[..., :4]}, ValueError, r"k must be .*, got \(2, 7, 2, 4\)"),
        ({"v": K[:, :6]}, ValueError, r"v must be .* = \(2, 7, 2, head_dim_v\) like k, got \(2, 6, 2, 8\)"),
        ({"q": Q[:, :, :3]}, ValueError, r"nheads_q must be a multiple of nheads_kv, got 3 and 2"),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, r"nheads_q must be a multiple of nheads_kv, got 4 and 0"),
        ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, r"head_dim must be at least 1"),
        (
            {"q": torch.zeros(2, 5, 8, 4).transpose(2, 3)},
            ValueError,
            r"q must have the features of a head next to one another",
        ),
        ({"q": Q.clone().requires_grad_()}, ValueError, r"q requires a gradient.*use onepass.attention"),
        ({"v": K.clone().requires_grad_()}, ValueError, r"v requires a gradient.*use onepass.attention"),
        ({"q": torch._neg_view(Q)}, ValueError, r"q is a lazily negated view: pass q.resolve_neg\(\)"),
        ({"step": "Flash"}, ValueError, r"step must be one of 'naive', 'blocked', 'fused', 'flash', got 'Flash'"),
        ({"step": None}, ValueError, r"step must be one of .*, got None"),
        ({"block_q": 0}, ValueError, r"block_q must be at least 1 \(or None for the step's own\), got 0"),
        ({"block_k": -3}, ValueError, r"block_k must be at least 1"),
        ({"block_k": 2**70}, ValueError, r"block_k must be at least 1|block_k must be below"),
        ({"block_q": 8.0}, TypeError, r"block_q must be an int or None, got float"),
        ({"block_q": True}, TypeError, r"block_q must be an int or None, got bool"),
        ({"softmax_scale": float("nan")}, ValueError, r"softmax_scale must be finite, got nan"),
        ({"softmax_scale": float("inf")}, ValueError, r"softmax_scale must be finite, got inf"),
        ({"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number, got str"),
    ],
)
def test_message(change, kind, message):
    with pytest.raises(kind, match=message):
        attention_step(**{"q": Q, "k": K, "v": K, **change})


def test_fake_tensors_are_refused_before_their_memory_is_touched():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(1, 2, 3, 4)
        with pytest.raises(TypeError, match="plain tensor whose memory can be read, got a FakeTensor"):
            attention_step(fake, fake, fake)


@pytest.mark.parametrize("step", STEPS)
def test_parameters_run_where_no_gradient_is_asked(step):
    q = torch.nn.Parameter(torch.randn(1, 3, 2, 8))
    with torch.no_grad():
        assert torch.equal(attention_step(q, q, q, step=step), attention_step(q.data, q.data, q.data, step=step))


def test_scores_that_do_not_fit_raise_memory_error():
    """A matrix of 2^24 x 2^24 scores is a petabyte; nothing is written before it is there."""
    length = 2**24
    q = torch.zeros(1, 1, 1, 1).expand(1, length, 1, 1)
    with pytest.raises(MemoryError, match="lab_naive could not allocate its workspace"):
        attention_step(q, q, q, step="naive")
