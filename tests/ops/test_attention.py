"""Attention: every backend against the formula, forward and gradients, packed and separate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmae.ops import _attention_plain as plain_ops
from fastmae.ops.attention import BACKENDS, attention, attention_kvpacked, attention_qkvpacked, describe_backends

SHAPES = [
    (1, 1, 1, 4, torch.float32), (2, 17, 4, 32, torch.bfloat16), (3, 50, 2, 64, torch.float32),
    (1, 197, 2, 32, torch.bfloat16),
]  # fmt: skip


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
@pytest.mark.parametrize(("n", "length", "heads", "dim", "dtype"), SHAPES)
def test_packed_against_formula(backend, n, length, heads, dim, dtype, device):
    qkv = torch.randn(n, length, 3, heads, dim, device=device).to(dtype)
    grad = torch.randn(n, length, heads, dim, device=device).to(dtype)

    def run(function, x):
        x = x.clone().requires_grad_()
        out = function(x)
        out.backward(grad.to(x.dtype))
        return out.detach(), x.grad

    truth, truth_grad = run(lambda x: formula(*x.unbind(2)), qkv.double())
    plain, plain_grad = run(lambda x: formula(*x.unbind(2)), qkv)
    got, got_grad = run(lambda x: attention_qkvpacked(x, backend), qkv)
    assert got.shape == truth.shape
    assert got.dtype == got_grad.dtype == dtype
    assert error(got, truth) <= 2 * error(plain, truth) + 1e-6
    # One token attends to itself alone: the gradient of q and k is zero in truth, and rounding in any arithmetic.
    if length > 1:
        assert error(got_grad, truth_grad) <= 2 * error(plain_grad, truth_grad) + 1e-6


def added(x: Tensor, bias: Tensor) -> Tensor:
    """``x`` (N, L, ..., H, Dh), which a bias was added to already: autograd sees the sum, nobody adds it again."""
    return x + (bias - bias.detach()).view(x.shape[2:])


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
def test_gradient_of_a_bias_that_was_added(backend, device):
    q, kv = torch.randn(2, 5, 3, 16, device=device), torch.randn(2, 12, 2, 3, 16, device=device)
    qkv, bias = torch.randn(2, 7, 3, 3, 16, device=device), torch.randn(144, device=device)
    for inputs, function, expected in (
        ((qkv, bias), lambda x, b: attention_qkvpacked(x, backend, b), lambda x, b: formula(*added(x, b).unbind(2))),
        (
            (q, kv, bias),
            lambda q, kv, b: attention_kvpacked(q, kv, backend, b),
            lambda q, kv, b: formula(added(q, b[:48]), *added(kv, b[48:]).unbind(2)),
        ),
    ):
        inputs = tuple(x.requires_grad_() for x in inputs)
        out, want = function(*inputs), expected(*inputs)
        assert torch.equal(out, function(*inputs[:-1], None))
        grad = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), rtol=1e-5, atol=2e-5
        )
        # A frozen bias is left alone.
        out = function(*inputs[:-1], bias.detach())
        assert torch.autograd.grad(out, (*inputs[:-1], bias), grad, allow_unused=True)[-1] is None


def test_packed_gradient_is_one_contiguous_tensor():
    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    attention_qkvpacked(qkv, "plain").sum().backward()
    assert qkv.grad.is_contiguous()
    assert "plain_attention_qkvpacked" in type(attention_qkvpacked(qkv, "plain").grad_fn).__name__


def test_gradients_in_double_precision():
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention_qkvpacked(x, "plain"), (qkv,))
    q, kv = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, 2, 4, dtype=torch.float64)
    q, kv = q.requires_grad_(), kv.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kv: attention_kvpacked(q, kv, "plain"), (q, kv))
    assert torch.autograd.gradcheck(lambda q, kv: attention(q, *kv.unbind(2), "plain"), (q, kv))


@pytest.mark.parametrize("cache_bytes", [1, 5 * 5 * 4 * 2, 5 * 5 * 4 * 3 * 2], ids=["head", "heads", "samples"])
def test_parts_are_pieced_together(cache_bytes, monkeypatch):
    monkeypatch.setattr(plain_ops, "_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    qkv = torch.randn(5, 5, 3, 3, 8, requires_grad=True)
    out, expected = attention_qkvpacked(qkv, "plain"), formula(*qkv.unbind(2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    (got,), (want,) = torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_opcheck():
    qkv, q = torch.randn(2, 5, 3, 2, 4, requires_grad=True), torch.randn(2, 3, 2, 4, requires_grad=True)
    kv = torch.randn(2, 5, 2, 2, 4, requires_grad=True)
    for forward, backward, inputs in (
        (plain_ops.plain_attention_qkvpacked, plain_ops.plain_attention_qkvpacked_backward, (qkv,)),
        (plain_ops.plain_attention_kvpacked, plain_ops.plain_attention_kvpacked_backward, (q, kv)),
        (plain_ops.plain_attention, plain_ops.plain_attention_backward, (q, kv[:, :, 0], kv[:, :, 1])),
    ):
        torch.library.opcheck(forward, inputs)
        inputs = tuple(x.detach() for x in inputs)
        out, weights = forward(*inputs)
        torch.library.opcheck(backward, (torch.randn_like(out), weights, *inputs))


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_compiles_to_one_graph(backend):
    compiled = torch.compile(lambda x, b: attention_qkvpacked(x, backend, b), fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 5, 3, 2, 4, requires_grad=True), torch.randn(24, requires_grad=True)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(attention_qkvpacked(inputs[0], backend, inputs[1]).square().sum(), inputs)
    torch.testing.assert_close(got, want)


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
    truth = qkv.detach().double().requires_grad_()
    out, want = attention_qkvpacked(qkv, backend), formula(*truth.unbind(2))
    grad = torch.randn_like(out)
    out.backward(grad)
    want.backward(grad.double())
    assert error(out, want) < 1e-2
    assert error(qkv.grad, truth.grad) < 2e-2


def test_every_backend_is_reported():
    assert set(BACKENDS) - {"auto"} <= set(dict(describe_backends()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: attention(t, t[..., :2], t), "k: expected"),
        (lambda t: attention(t, t, t[:, :1]), "v: expected"),
        (lambda t: attention(t[0], t, t), "q: expected"),
        (lambda t: attention(t.int(), t, t), "q: expected a floating-point"),
        (
            lambda t: attention(t, t, t, "flash"),
            "backend: expected one of auto, plain, sdpa, triton, xformers, got 'flash'",
        ),
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
