"""Attention: every backend against the formula, forward and gradients, packed and separate."""

from __future__ import annotations

import pytest
import torch
from property_cases import assert_as_accurate
from torch import Tensor

from fastmae.ops import _attention_plain as plain_ops
from fastmae.ops.attention import attention, attention_kvpacked, attention_qkvpacked


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def added(x: Tensor, bias: Tensor) -> Tensor:
    """``x`` (N, L, ..., H, Dh), which a bias was added to already: autograd sees the sum, nobody adds it again."""
    return x + (bias - bias.detach()).view(x.shape[2:])


def formula_kv(q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
    dim = q[0, 0].numel()
    return formula(added(q, bias[:dim]), *added(kv, bias[dim:]).unbind(2))


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
def test_gradient_of_a_bias_that_was_added(backend, device):
    shapes = (2, 7, 3, 3, 16), (2, 5, 3, 16), (2, 12, 2, 3, 16), (144,)
    qkv, q, kv, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    packed = lambda x, b: attention_qkvpacked(x, backend, b)  # noqa: E731
    assert_as_accurate(packed, lambda x, b: formula(*added(x, b).unbind(2)), (qkv, bias), floor=1.0)
    assert_as_accurate(lambda q, kv, b: attention_kvpacked(q, kv, backend, b), formula_kv, (q, kv, bias), floor=1.0)
    assert torch.equal(packed(qkv, bias), packed(qkv, None))
    frozen = packed(qkv, bias.detach()).sum()
    assert torch.autograd.grad(frozen, (qkv, bias), allow_unused=True)[1] is None


def test_packed_gradient_is_one_contiguous_tensor():
    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    attention_qkvpacked(qkv, "plain").sum().backward()
    assert qkv.grad.is_contiguous()
    assert "plain_attention_qkvpacked" in type(attention_qkvpacked(qkv, "plain").grad_fn).__name__


def test_gradients_in_double_precision():
    q, kv = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, 2, 4, dtype=torch.float64)
    inputs = q.requires_grad_(), kv.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kv: attention_kvpacked(q, kv, "plain"), inputs)


@pytest.mark.parametrize("cache_bytes", [1, 5 * 5 * 4 * 2, 5 * 5 * 4 * 3 * 2], ids=["head", "heads", "samples"])
def test_parts_are_pieced_together(cache_bytes, monkeypatch):
    monkeypatch.setattr(plain_ops, "_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    qkv = torch.randn(5, 5, 3, 3, 8, requires_grad=True)
    assert_as_accurate(lambda x: attention_qkvpacked(x, "plain"), lambda x: formula(*x.unbind(2)), (qkv,))


def test_autocast_leaves_the_result_in_half_precision():
    qkv = torch.randn(2, 17, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("plain", "sdpa"):
            assert attention_qkvpacked(qkv, backend).dtype == torch.bfloat16
            q, k, v = qkv.unbind(2)
            assert attention(q, k, v, backend).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["plain", "sdpa", "xformers"])
@pytest.mark.parametrize(("length", "heads", "dim"), [(50, 12, 64), (197, 16, 32)])
def test_backends_on_a_gpu(backend, length, heads, dim):
    if backend == "xformers":
        pytest.importorskip("xformers")
    qkv = torch.randn(2, length, 3, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert_as_accurate(lambda x: attention_qkvpacked(x, backend), lambda x: formula(*x.unbind(2)), (qkv,), floor=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: attention(t, t[..., :2], t), "k: expected"),
        (lambda t: attention(t, t, t[:, :1]), "v: expected"),
        (lambda t: attention(t[0], t, t), "q: expected"),
        (lambda t: attention(t.int(), t, t), "q: expected a floating-point"),
        (lambda t: attention(t, t, t, "flash"), "backend: expected one of auto, plain, .*, got 'flash'"),
        (lambda t: attention(t, t, t, "xformers"), "backend: 'xformers'"),
        (lambda t: attention_kvpacked(t, t), "kv: expected"),
        (lambda t: attention_kvpacked(t, torch.randn(2, 5, 2, 3, 2)), "k: expected"),
        (lambda t: attention_qkvpacked(t), "qkv: expected"),
        (lambda t: attention_qkvpacked(None), "qkv: expected"),
        (lambda t: attention_qkvpacked(t[..., None], "plain", t[0, 0, 0]), r"bias: expected .*\(12,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 3, 4))
